//! What a guest of an image runs: the image's own init, or what its configuration has a container run, by a
//! shell script of ours.

use super::{
    MADE, OciError,
    manifest::Process,
    tree::{Id, Node, Tree},
};
use crate::image::mkfs::Meta;

/// Where the script is.
const PATH: &str = "/sbin/howdah-init";
const SHELL: &str = "/bin/sh";
/// The script, but for the configuration.
const SCRIPT: &str = include_str!("init.sh");
/// What boots a disk without partitions; a guest that panics resets, and its VM ends.
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rw reboot=k panic=-1";

/// What a guest starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Startup {
    /// The image's `/sbin/init`.
    System,
    /// What the configuration says, or else a shell: these words.
    Command(Vec<String>),
}

impl Startup {
    /// The kernel's command line.
    pub fn cmdline(&self) -> String {
        match self {
            Self::System => CMDLINE.to_owned(),
            Self::Command(_) => format!("{CMDLINE} init={PATH}"),
        }
    }
}

/// Finds out how a guest starts, and adds what it needs for that.
pub(super) fn add(tree: &mut Tree, process: &Process) -> Result<Option<Startup>, OciError> {
    let words = [&process.entrypoint, &process.cmd];
    let command: Vec<String> = words.into_iter().flatten().flatten().cloned().collect();
    let init = program(tree, "/sbin/init");
    let shell = program(tree, SHELL);
    if shell.is_some() {
        let shown = if command.is_empty() { vec![SHELL.to_owned()] } else { command.clone() };
        let script = script(process, &shown)?;
        let meta = Meta { mode: 0o755, seconds: MADE.into(), ..Meta::default() };
        tree.put(PATH, meta, script.into_bytes())?;
    }
    // A small image has an init because its busybox has all there is, not because it would start anything.
    let has_system = init.is_some_and(|(_, is_busybox)| !is_busybox || command.is_empty());
    Ok(match (has_system, shell.is_some(), command.is_empty()) {
        (true, ..) => Some(Startup::System),
        (_, true, false) => Some(Startup::Command(command)),
        (_, true, true) => Some(Startup::Command(vec![SHELL.to_owned()])),
        _ => None,
    })
}

/// A program in the image, and whether it is busybox.
fn program(tree: &Tree, path: &str) -> Option<(Id, bool)> {
    let (id, name) = tree.find(path)?;
    let (meta, node) = tree.get(id)?;
    if !matches!(node, Node::File { .. }) || meta.mode & 0o111 == 0 {
        return None;
    }
    // By a symbolic link, or by a hard one.
    let is_same = |path| tree.find(path).is_some_and(|(other, _)| other == id);
    Some((id, name == b"busybox" || is_same("/bin/busybox")))
}

/// The script with the configuration behind it.
fn script(process: &Process, command: &[String]) -> Result<String, OciError> {
    let mut script = SCRIPT.to_owned();
    script.push_str("environment() {\n    :\n");
    for variable in process.env.iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        // Others a shell cannot have.
        if is_name(name) {
            script.push_str(&format!("    export {name}={}\n", quoted(value)?));
        }
    }
    let user = process.user.as_deref().unwrap_or_default();
    let (user, group) = user.split_once(':').unwrap_or((user, ""));
    let user = if user.is_empty() { "0" } else { user };
    let directory = process.working_dir.as_deref().filter(|dir| !dir.is_empty()).unwrap_or("/");
    script.push_str("}\n\n");
    for (name, value) in [("user", user), ("group", group), ("directory", directory)] {
        script.push_str(&format!("{name}={}\n", quoted(value)?));
    }
    let words: Vec<_> = command.iter().map(|word| quoted(word)).collect::<Result<_, _>>()?;
    script.push_str(&format!("main {}\n", words.join(" ")));
    Ok(script)
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// A text as one word of a shell, whatever is in it.
fn quoted(text: &str) -> Result<String, OciError> {
    if text.contains('\0') {
        return Err(OciError::Process("it has a zero byte in a text".into()));
    }
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn shell(script: &str, args: &[&str]) -> String {
        let ran = Command::new("sh").args(["-c", script, "sh"]).args(args).output().unwrap();
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    }

    #[test]
    fn the_script_is_one() {
        let process = Process {
            user: Some("app:wheel".into()),
            env: Some(vec!["PATH=/opt/bin".into(), "my.var=x".into(), "IT=it's".into()]),
            ..Process::default()
        };
        let script = script(&process, &["/bin/a b".into(), "$HOME".into()]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("init");
        std::fs::write(&path, &script).unwrap();
        assert_eq!(shell("sh -n \"$1\" && echo fine", &[path.to_str().unwrap()]), "fine\n");
        assert!(script.ends_with("main '/bin/a b' '$HOME'\n"), "{script}");
        assert!(script.contains("user='app'\ngroup='wheel'\ndirectory='/'\n"), "{script}");
        assert!(script.contains(r"export IT='it'\''s'") && !script.contains("my.var"), "{script}");
        let zero = Process { user: Some("a\0".into()), ..Process::default() };
        assert!(super::script(&zero, &[]).is_err());
    }

    /// The functions of the script that need no guest.
    #[test]
    fn users_are_found_in_the_lists_of_the_image() {
        let functions = SCRIPT.replace("/etc/passwd", "\"$1\"").replace("/etc/group", "\"$2\"");
        let dir = tempfile::tempdir().unwrap();
        let [passwd, group] = ["passwd", "group"].map(|name| dir.path().join(name));
        std::fs::write(&passwd, "root:x:0:0::/root:/bin/sh\napp:x:7:8::/home/app:/bin/sh\n")
            .unwrap();
        std::fs::write(&group, "root:x:0:\nwheel:x:9:app\n").unwrap();
        // Functions have arguments of their own.
        let script =
            functions.replace("identity() {", "identity() { set -- \"$passwd\" \"$group_file\"");
        for (user, group_name, is) in [
            ("0", "", "0:0:/root"),
            ("app", "", "7:8:/home/app"),
            ("7", "wheel", "7:9:/home/app"),
            ("app", "12", "7:12:/home/app"),
            ("1234", "", "1234:0:"),
            ("nobody", "", "none"),
            ("app", "nobody", "none"),
        ] {
            let script = format!(
                "{script}\npasswd=$1 group_file=$2 user='{user}' group='{group_name}'\n\
                 if identity; then echo \"$uid:$gid:$home\"; else echo none; fi"
            );
            let args = [passwd.to_str().unwrap(), group.to_str().unwrap()];
            assert_eq!(shell(&script, &args).trim(), is, "{user}:{group_name}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_text_is_one_word(text in "[^\0]{0,40}") {
            let said = shell(&format!("printf '%s.' {}", quoted(&text).unwrap()), &[]);
            prop_assert_eq!(said, format!("{text}."));
        }
    }
}
