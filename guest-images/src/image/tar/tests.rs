//! Archives that another implementation wrote.

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;

impl Skip for &[u8] {}

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(3);
    header
}

fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut archive = Archive::new(archive);
    let mut all = Vec::new();
    while let Some(entry) = archive.next()? {
        let mut content = vec![0; archive.left as usize];
        archive.read_exact(&mut content)?;
        all.push((entry, content));
    }
    Ok(all)
}

fn one(header: &Header, extensions: &[(&str, &[u8])]) -> Result<Entry, TarError> {
    let mut builder = Builder::new(Vec::new());
    builder.append_pax_extensions(extensions.iter().copied()).unwrap();
    builder.append(header, &b""[..]).unwrap();
    Ok(read(&builder.into_inner().unwrap())?.remove(0).0)
}

#[test]
fn entries_come_with_their_content() {
    let mut builder = Builder::new(Vec::new());
    for (path, content) in [("a", &b"one"[..]), ("dir/b", b""), ("c", &[7; 1024])] {
        let mut header = header(EntryType::Regular, content.len() as u64);
        builder.append_data(&mut header, path, content).unwrap();
    }
    let archive = builder.into_inner().unwrap();
    let all = read(&archive).unwrap();
    let names: Vec<_> = all.iter().map(|(entry, _)| entry.path.as_slice()).collect();
    assert_eq!(names, [&b"a"[..], b"dir/b", b"c"]);
    assert_eq!((all[0].1.as_slice(), all[2].1.len()), (&b"one"[..], 1024));
    let (entry, _) = &all[0];
    assert_eq!(&archive[entry.at as usize..][..3], b"one");
    assert_eq!((entry.meta.mode, entry.meta.uid, entry.meta.gid), (0o644, 1, 2));
    assert_eq!(entry.meta.seconds, 3);
    // Contents that nobody reads are gone over.
    let mut unread = Archive::new(archive.as_slice());
    let mut count = 0;
    while unread.next().unwrap().is_some() {
        count += 1;
    }
    assert_eq!(count, 3);
    // However an archive is cut off, that is said, but for its end of zeros.
    for end in 0..archive.len() - 1024 {
        let cut = read(&archive[..end]);
        assert!(cut.is_err() || end % 512 == 0, "{end}");
    }
}

#[test]
fn names_may_be_long_and_in_three_forms() {
    let long = "directory/".repeat(30) + "name";
    // GNU's own entries.
    let mut gnu = Builder::new(Vec::new());
    let mut link = Header::new_gnu();
    link.set_entry_type(EntryType::Symlink);
    link.set_size(0);
    gnu.append_link(&mut link, &long, &long).unwrap();
    let (entry, _) = read(&gnu.into_inner().unwrap()).unwrap().remove(0);
    assert_eq!(entry.path, long.as_bytes());
    assert_eq!(entry.kind, Kind::Symlink(long.clone().into_bytes()));
    // A prefix.
    let middle = "directory/".repeat(14) + "name";
    let mut header = header(EntryType::Regular, 0);
    header.set_path(&middle).unwrap();
    header.set_cksum();
    assert_eq!(one(&header, &[]).unwrap().path, middle.as_bytes());
    // Records of pax, which count more.
    let entry = one(&header, &[("path", long.as_bytes()), ("comment", b"!")]).unwrap();
    assert_eq!(entry.path, long.as_bytes());
}

#[test]
fn extensions_say_what_headers_cannot() {
    let mut header = header(EntryType::Regular, 0);
    header.set_path("file").unwrap();
    header.set_cksum();
    let extensions: &[(&str, &[u8])] = &[
        ("uid", b"3000000"),
        ("gid", b"4000000"),
        ("mtime", b"-1.25"),
        ("SCHILY.xattr.user.a", b"old"),
        ("SCHILY.xattr.user.a", b"x=y\n"),
        ("SCHILY.xattr.system.posix_acl_access", b"acl"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
    ];
    let entry = one(&header, extensions).unwrap();
    assert_eq!((entry.meta.uid, entry.meta.gid), (3_000_000, 4_000_000));
    assert_eq!((entry.meta.seconds, entry.meta.nanoseconds), (-2, 750_000_000));
    assert_eq!(entry.meta.xattrs, [Xattr::new(b"user.a", b"x=y\n").unwrap()]);
    assert_eq!(entry.left_out, 2);
    for bad in [("uid", &b"-1"[..]), ("uid", b"5000000000"), ("size", b"9x"), ("mtime", b"now")] {
        assert!(matches!(one(&header, &[bad]), Err(TarError::Number(_))), "{bad:?}");
    }
    let sparse = one(&header, &[("GNU.sparse.major", b"1")]);
    assert!(sparse.unwrap_err().to_string().contains("sparse"));
    // Large numbers in binary.
    header.set_uid(1 << 31);
    header.set_cksum();
    assert_eq!(one(&header, &[]).unwrap().meta.uid, 1 << 31);
    header.as_old_mut().mtime = *b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe";
    header.set_cksum();
    assert_eq!(one(&header, &[]).unwrap().meta.seconds, -2);
    header.as_old_mut().mtime = [0x80; 12];
    header.as_old_mut().size = [0x80; 12];
    header.set_cksum();
    assert!(matches!(one(&header, &[]), Err(TarError::Number(_))));
}

#[test]
fn kinds_are_told_and_only_files_have_content() {
    let mut device = header(EntryType::Block, 0);
    device.set_path("disk").unwrap();
    device.set_device_major(8).unwrap();
    device.set_device_minor(1).unwrap();
    device.set_cksum();
    let kind = Kind::Device { is_block: true, major: 8, minor: 1 };
    assert_eq!(one(&device, &[]).unwrap().kind, kind);
    device.set_device_minor(1 << 20).unwrap();
    device.set_cksum();
    assert!(matches!(one(&device, &[]), Err(TarError::Number(_))));
    for (kind, is) in [
        (EntryType::Directory, Kind::Directory),
        (EntryType::Fifo, Kind::Fifo),
        (EntryType::Link, Kind::Hard(b"target".to_vec())),
        (EntryType::Continuous, Kind::File(0)),
    ] {
        let mut header = header(kind, 0);
        header.set_path("a").unwrap();
        header.set_link_name("target").unwrap();
        header.set_cksum();
        assert_eq!(one(&header, &[]).unwrap().kind, is);
    }
    let mut old = Header::new_old();
    old.set_path("dir/").unwrap();
    old.set_size(0);
    old.set_cksum();
    assert_eq!(one(&old, &[]).unwrap().kind, Kind::Directory);
    for (kind, says) in [(EntryType::GNUSparse, "sparse"), (EntryType::new(b'V'), "unknown kind")] {
        let mut header = header(kind, 0);
        header.set_path("odd").unwrap();
        header.set_cksum();
        let why = one(&header, &[]).unwrap_err().to_string();
        assert!(why.contains("odd") && why.contains(says), "{why}");
    }
    // A directory that says it is long is not.
    let mut dir = header(EntryType::Directory, 1 << 40);
    dir.set_path("dir/").unwrap();
    dir.set_cksum();
    let mut archive = dir.as_bytes().to_vec();
    archive.extend([0; 1024]);
    assert_eq!(read(&archive).unwrap().len(), 1);
}

#[test]
fn what_is_no_archive_is_refused_in_little_memory() {
    assert!(read(b"").unwrap().is_empty());
    assert!(read(&[0; 512]).unwrap().is_empty());
    assert!(matches!(read(&[1; 511]), Err(TarError::Short)));
    assert!(matches!(read(&[b'7'; 512]), Err(TarError::Header(0))));
    // An extension of a terabyte.
    let mut long = header(EntryType::GNULongName, 1 << 40);
    long.set_path("././@LongLink").unwrap();
    long.set_cksum();
    assert!(matches!(read(long.as_bytes()), Err(TarError::Extension)));
    // Extensions without an entry.
    let mut builder = Builder::new(Vec::new());
    for _ in 0..20 {
        builder.append_pax_extensions([("uid", &b"1"[..])]).unwrap();
    }
    assert!(matches!(read(&builder.into_inner().unwrap()), Err(TarError::Header(_))));
}

proptest! {
    #[test]
    fn any_bytes_are_read(mut bytes in prop::collection::vec(any::<u8>(), 0..3000), kind in any::<u8>()) {
        let _ = read(&bytes);
        // As far as behind the sum.
        if bytes.len() > 512 {
            bytes[156] = kind;
            let mut header: Block = bytes[..512].try_into().unwrap();
            header[124..136].copy_from_slice(b"00000001000\0");
            let sum = format!("{:06o}\0 ", sums(&header)[0]);
            header[148..156].copy_from_slice(sum.as_bytes());
            bytes[..512].copy_from_slice(&header);
            let _ = read(&bytes);
        }
    }

    #[test]
    fn numbers_are_read_as_they_were_written(number in any::<u64>()) {
        let mut header = Header::new_gnu();
        header.set_size(number);
        let field = &header.as_bytes()[124..136];
        prop_assert_eq!(signed(field), i64::try_from(number).ok());
        prop_assert_eq!(time(format!("{number}.5").as_bytes()).map(|(s, _)| s), i64::try_from(number).ok());
    }
}
