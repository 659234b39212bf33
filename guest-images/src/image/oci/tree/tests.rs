use super::*;
use crate::image::mkfs::Xattr;

fn entry(path: &str, kind: Kind) -> Entry {
    let meta = Meta { mode: 0o644, ..Meta::default() };
    Entry { path: path.as_bytes().to_vec(), kind, meta, at: 0, left_out: 0 }
}

/// Layers of paths: `a/` is a directory, `a -> b` a symbolic link, `a = b` a hard one; all else are files.
fn tree(layers: &[&[&str]]) -> Result<Tree, TreeError> {
    let mut tree = Tree::new();
    for (number, layer) in layers.iter().enumerate() {
        tree.begin(number);
        for (at, line) in (0..).zip(*layer) {
            let (path, kind) = if let Some((path, target)) = line.split_once(" -> ") {
                (path, Kind::Symlink(target.as_bytes().to_vec()))
            } else if let Some((path, target)) = line.split_once(" = ") {
                (path, Kind::Hard(target.as_bytes().to_vec()))
            } else if line.ends_with('/') {
                (*line, Kind::Directory)
            } else {
                (*line, Kind::File(1))
            };
            tree.apply(entry(path, kind), at)?;
        }
    }
    Ok(tree)
}

/// All paths, and of files which entry of which layer they are.
fn listed(tree: &Tree) -> Vec<String> {
    let mut all = Vec::new();
    let mut ahead = vec![(Tree::ROOT, String::new())];
    while let Some((id, path)) = ahead.pop() {
        let what = match &tree.get(id).unwrap().1 {
            Node::Directory(children) => {
                for (name, child) in children {
                    ahead.push((child.id, format!("{path}/{}", shown(name))));
                }
                String::from("/")
            }
            Node::File { source: Source::Layer { layer, entry }, .. } => {
                format!(" {layer}.{entry}")
            }
            Node::Symlink(target) => format!(" -> {}", shown(target)),
            other => format!(" {other:?}"),
        };
        if !path.is_empty() {
            all.push(format!("{path}{what}"));
        }
    }
    all.sort();
    all
}

fn assert_tree(layers: &[&[&str]], is: &[&str]) {
    assert_eq!(listed(&tree(layers).unwrap()), is, "{layers:?}");
}

#[test]
fn later_layers_are_laid_over_earlier_ones() {
    assert_tree(&[&["./", "a/", "./a/b", "/c"]], &["/a/", "/a/b 0.2", "/c 0.3"]);
    assert_tree(&[&["a/b"], &["a/", "a/b", "a/c"]], &["/a/", "/a/b 1.1", "/a/c 1.2"]);
    // Another kind takes the place of all that was there.
    assert_tree(&[&["a/b"], &["a"]], &["/a 1.0"]);
    assert_tree(&[&["a"], &["a/", "a/b"]], &["/a/", "/a/b 1.1"]);
    // A directory that is there stays what it is, and gets another owner.
    let tree = tree(&[&["a/b"], &["a/"]]).unwrap();
    let (id, _) = tree.find("/a").unwrap();
    assert_eq!(tree.get(id).unwrap().0.mode, 0o644);
}

#[test]
fn whiteouts_hide_what_is_below_and_nothing_else() {
    assert_tree(&[&["a", "b"], &[".wh.a"]], &["/b 0.1"]);
    assert_tree(&[&["a/b", "a/c"], &["a/.wh.b"]], &["/a/", "/a/c 0.1"]);
    assert_tree(&[&["a/b"], &[".wh.a", "a/", "a/c"]], &["/a/", "/a/c 1.2"]);
    // Whichever comes first in the layer.
    assert_tree(&[&["a"], &["a", ".wh.a"]], &["/a 1.0"]);
    assert_tree(&[&["a/b"], &["a/c", ".wh.a"]], &["/a/", "/a/c 1.0"]);
    for opaque in [&["a/.wh..wh..opq", "a/x/new"], &["a/x/new", "a/.wh..wh..opq"]] {
        let layers: &[&[&str]] = &[&["a/b", "a/x/old", "c"], opaque];
        let is = listed(&tree(layers).unwrap()).join(" ");
        assert!(is.contains("/a/x/new 1.") && !is.contains("old") && !is.contains("/a/b"), "{is}");
        assert!(is.contains("/c 0.2"), "{is}");
    }
    // In the root, of nothing, and notes of others.
    assert_tree(&[&["a", "b/c"], &[".wh..wh..opq"]], &[]);
    assert_tree(&[&["a"], &["x/.wh.y", ".wh.none", ".wh..wh.plnk"]], &["/a 0.0"]);
    // A file with two names keeps the other one.
    assert_tree(&[&["a", "b = a"], &[".wh.a"]], &["/b 0.0"]);
    for path in [".wh.", ".wh...", ".wh..", ".wh.a/b"] {
        let why = tree(&[&["a"], &[path]]).unwrap_err().to_string();
        assert!(why.contains("whiteout"), "{why}");
    }
}

#[test]
fn links_on_the_way_lead_to_somewhere_in_the_tree() {
    assert_tree(
        &[&["usr/lib/", "lib -> usr/lib"], &["lib/x"]],
        &["/lib -> usr/lib", "/usr/", "/usr/lib/", "/usr/lib/x 1.0"],
    );
    // Absolute ones, and those that want out.
    assert_tree(
        &[&["etc/", "out -> ../../../../etc", "abs -> /etc"], &["out/a", "abs/b"]],
        &["/abs -> /etc", "/etc/", "/etc/a 1.0", "/etc/b 1.1", "/out -> ../../../../etc"],
    );
    // To what is not there yet.
    assert_tree(
        &[&["l -> new/dir", "l/f"]],
        &["/l -> new/dir", "/new/", "/new/dir/", "/new/dir/f 0.1"],
    );
    assert_tree(&[&["a/", "l -> a", "a/x"], &["l/.wh.x"]], &["/a/", "/l -> a"]);
    // The last step of a path is what is replaced, not what it leads to.
    assert_tree(&[&["a/x", "l -> a"], &["l/"]], &["/a/", "/a/x 0.0", "/l/"]);
    for layer in [
        &["l -> l", "l/x"][..],
        &["a -> b", "b -> a", "a/x"],
        &["f", "f/x"],
        &["l -> missing/../x", "l/y"],
    ] {
        assert!(matches!(tree(&[layer]), Err(TreeError::Path { .. })), "{layer:?}");
    }
    let long = format!("l -> {}", "n".repeat(300));
    assert!(matches!(tree(&[&[&long, "l/x"]]), Err(TreeError::Path { .. })));
}

#[test]
fn paths_that_want_out_are_refused() {
    for path in ["../etc/passwd", "a/../../b", "a/..", "/..", &"n".repeat(256), &"a/".repeat(3000)]
    {
        let why = tree(&[&[path]]).unwrap_err();
        assert!(matches!(why, TreeError::Path { .. }), "{why}");
    }
    for target in ["../../etc/shadow", "missing", "dir", "/", "dir/.."] {
        let line = format!("x = {target}");
        assert!(tree(&[&["dir/", &line]]).is_err(), "{target}");
    }
    assert!(tree(&[&["l -> "]]).is_err());
    assert_tree(&[&["a/b", "c = /a/b", "a/b = c"]], &["/a/", "/a/b 0.0", "/c 0.0"]);
}

#[test]
fn there_is_an_end_to_how_much_it_takes() {
    let mut tree = Tree::new();
    let mut much = entry("a", Kind::Directory);
    much.meta.xattrs = vec![Xattr::new(b"user.x", &[0; 1 << 20]).unwrap()];
    let end = (0..1000).find_map(|_| tree.apply(much.clone(), 0).err());
    assert!(matches!(end, Some(TreeError::Text)), "{end:?}");
    let mut tree = Tree::new();
    let end =
        (0..2 * MAX_NODES as u64).find_map(|n| tree.apply(entry("same", Kind::Fifo), n).err());
    assert!(matches!(end, Some(TreeError::Files)), "{end:?}");
}
