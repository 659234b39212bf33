//! The link as TCP sees it. Where namespaces are not permitted there is nothing to test.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
};

use super::*;

fn link(shape: &Shape) -> Option<Link> {
    match Link::new(shape) {
        Ok(link) => Some(link),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => None,
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => panic!("{e}"),
    }
}

/// Connects through the link and gives each end to one function, on a thread of its namespace.
fn between<T: Send>(
    link: &Link,
    near: impl FnOnce(TcpStream) -> T + Send,
    far: impl FnOnce(TcpStream) + Send,
) -> T {
    let (tell, told) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            link.far.enter().unwrap();
            let listener = TcpListener::bind((Link::FAR, 0)).unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            far(listener.accept().unwrap().0);
        });
        let near = scope.spawn(move || {
            link.near.enter().unwrap();
            let address: SocketAddr = told.recv().unwrap();
            let stream = TcpStream::connect(address).unwrap();
            stream.set_nodelay(true).unwrap();
            near(stream)
        });
        near.join().unwrap()
    })
}

#[test]
fn bytes_take_what_the_rate_says() {
    let shape = Shape::of(20.0, Duration::from_millis(5));
    let Some(link) = link(&shape) else { return };
    let share = between(
        &link,
        |mut stream| {
            let data = vec![7; 256 << 10];
            // Past slow start.
            (0..4).for_each(|_| stream.write_all(&data).unwrap());
            let (start, before) = (link.origin.elapsed(), link.carried_bytes.load(Relaxed));
            (0..10).for_each(|_| stream.write_all(&data).unwrap());
            let (end, after) = (link.origin.elapsed(), link.carried_bytes.load(Relaxed));
            (after - before) as f64 / shape.capacity_bytes(start, end)
        },
        |mut stream| _ = std::io::copy(&mut stream, &mut std::io::sink()),
    );
    assert!((0.97..=1.03).contains(&share), "{share}");
}

#[test]
fn a_round_trip_takes_twice_the_delay() {
    let Some(link) = link(&Shape::of(50.0, Duration::from_millis(25))) else { return };
    let mut trips = between(
        &link,
        |mut stream| {
            let mut trip = || {
                let start = Instant::now();
                stream.write_all(b"x").unwrap();
                stream.read_exact(&mut [0]).unwrap();
                start.elapsed()
            };
            (0..9).map(|_| trip()).collect::<Vec<_>>()
        },
        |mut stream| {
            let mut byte = [0];
            while stream.read_exact(&mut byte).is_ok() {
                stream.write_all(&byte).unwrap();
            }
        },
    );
    trips.sort();
    let middle = trips[4].as_secs_f64() * 1e3;
    assert!((50.0..52.0).contains(&middle), "{trips:?}");
}
