use super::*;

fn server_init() -> Vec<u8> {
    let mut bytes = vec![0, 8, 0, 2];
    bytes.extend([0; 16]);
    bytes.extend([0, 0, 0, 2, b'h', b'i']);
    bytes
}

fn update(x: u8, width: u8, grey: u8) -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 1, 0, x, 0, 0, 0, width, 0, 2, 0, 0, 0, 0];
    bytes.extend(vec![grey; usize::from(width) * 2 * 4]);
    bytes
}

/// Says something to the viewer, a byte at a time; returns what it heard and what it says.
fn tell(desktop: &mut Desktop, bytes: &[u8], now_ns: i64) -> (Vec<Heard>, Vec<u8>) {
    let mut wire = Wire::default();
    let heard = bytes.iter().flat_map(|byte| desktop.hear(&[*byte], now_ns, &mut wire).unwrap());
    (heard.collect(), wire.take())
}

fn greeted() -> Desktop {
    let mut desktop = Desktop::new(1);
    desktop.connected(&mut Wire::default());
    assert_eq!(tell(&mut desktop, b"RFB 003.008\n", 0).1, b"RFB 003.008\n");
    assert_eq!(tell(&mut desktop, &[2, 16, 1], 0).1, [1]);
    assert_eq!(tell(&mut desktop, &[0; 4], 0).1, [1]);
    let (_, says) = tell(&mut desktop, &server_init(), 0);
    assert_eq!(says[says.len() - 10..], [3, 0, 0, 0, 0, 0, 0, 8, 0, 2]);
    assert!(!desktop.ready(i64::MAX / 2));
    desktop
}

#[test]
fn a_key_is_answered_by_the_first_pixel_that_changes() {
    let mut desktop = greeted();
    let mut now = 1_000_000_000;
    let (heard, says) = tell(&mut desktop, &update(0, 8, 7), now);
    assert_eq!((heard, says), (Vec::new(), vec![3, 1, 0, 0, 0, 0, 0, 8, 0, 2]));
    assert!(!desktop.ready(now));
    now += STILL_NS;
    assert!(desktop.ready(now));

    let mut wire = Wire::default();
    assert_eq!(desktop.ask(5, now, &mut wire), Ok(16));
    assert_eq!(wire.take()[..2], [4, 1]);
    assert!(!desktop.ready(now + STILL_NS));
    // A bell, the same pixels again: nothing that the user would see.
    assert!(tell(&mut desktop, &[2], now).0.is_empty());
    assert!(tell(&mut desktop, &update(2, 3, 7), now).0.is_empty());
    let (heard, _) = tell(&mut desktop, &update(2, 3, 9), now);
    assert_eq!((heard.len(), heard[0].seq, heard[0].bytes), (1, 5, 16 + 3 * 2 * 4));
    // The rest of the reaction belongs to nobody.
    assert!(tell(&mut desktop, &update(2, 3, 8), now + 1).0.is_empty());
    assert!(!desktop.ready(now + STILL_NS) && desktop.ready(now + 1 + STILL_NS));
}

#[test]
fn strange_servers_are_left_with_a_word() {
    let error_of = |said: &[u8], expected: Expected| {
        let mut desktop = Desktop::new(1);
        desktop.expected = expected;
        desktop.hear(said, 0, &mut Wire::default()).unwrap_err().0
    };
    assert!(error_of(b"SSH-2.0-abcd", Expected::Version).contains("no RFB"));
    assert!(error_of(b"RFB 003.003\n", Expected::Version).contains("too old"));
    assert!(error_of(&[1, 2], Expected::Security).contains("password"));
    assert!(error_of(&[0, 0, 0, 0, 2, b'n', b'o'], Expected::Security).contains("no"));
    assert!(error_of(&[0, 0, 0, 1, 0, 0, 0, 1, b'x'], Expected::Welcome).contains('x'));
    assert!(error_of(&[9], Expected::Message).contains("kind 9"));
    assert!(error_of(&[3, 0, 0, 0, 255, 0, 0, 0], Expected::Message).contains("text"));
    let mut huge = server_init();
    huge[0] = 0xff;
    assert!(error_of(&huge, Expected::Screen).contains("screen"));
    let beyond = [&[0, 0, 0, 1, 0, 6][..], &update(0, 8, 0)[6..]].concat();
    let mut desktop = greeted();
    assert!(desktop.hear(&beyond, 0, &mut Wire::default()).is_err());
}
