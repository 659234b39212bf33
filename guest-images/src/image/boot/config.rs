//! What boot loaders are told: GRUB's scripts, extlinux, entries of the Boot Loader Specification.

use std::cmp::Ordering;

/// What a boot loader starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where the kernel is, in the file system that has the configuration.
    pub(super) kernel: String,
    /// Where the initrds are.
    pub(super) initrds: Vec<String>,
    /// The kernel's command line, as it stands there.
    pub(super) options: String,
}

/// The first kernel of a configuration. Scripts are not run: a path with a variable in it is not taken.
pub(super) fn first_entry(text: &str) -> Option<Entry> {
    let mut entry = Entry::default();
    let unquoted = |word: &str| word.trim_matches(['"', '\'']).to_owned();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(word) = words.next() else { continue };
        match word.to_ascii_lowercase().as_str() {
            "linux" | "linux16" | "linuxefi" | "kernel" if entry.kernel.is_empty() => {
                entry.kernel = words.next().map(unquoted).unwrap_or_default();
                let more = words.collect::<Vec<_>>().join(" ");
                entry.options = format!("{more} {}", entry.options).trim().to_owned();
            }
            // Another one begins.
            "linux" | "linux16" | "linuxefi" | "kernel" | "menuentry" | "label" | "}" | "else"
            | "fi"
                if !entry.kernel.is_empty() =>
            {
                break;
            }
            "initrd" | "initrd16" | "initrdefi" => {
                entry.initrds.extend(words.flat_map(|word| word.split(',')).map(unquoted));
            }
            "options" | "append" => {
                let more: Vec<_> = words.collect();
                entry.options = format!("{} {}", entry.options, more.join(" ")).trim().to_owned();
            }
            _ => {}
        }
    }
    let is_path = |path: &str| path.starts_with('/') && !path.contains('$');
    entry.initrds.retain(|path| is_path(path));
    is_path(&entry.kernel).then_some(entry)
}

/// The name with the highest version in it: numbers count as numbers, so that 6.12 comes after 6.9.
pub(super) fn newest<'a>(names: impl Iterator<Item = &'a String>) -> Option<&'a String> {
    names.max_by(|a, b| by_version(a, b))
}

fn by_version(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let (number_a, rest_a) = split_digits(a);
        let (number_b, rest_b) = split_digits(b);
        if !number_a.is_empty() && !number_b.is_empty() {
            // Of numbers without leading zeros the longer one is larger.
            let bare = [number_a, number_b].map(|digits| digits.trim_start_matches('0'));
            let order = bare[0].len().cmp(&bare[1].len()).then(bare[0].cmp(bare[1]));
            if order.is_ne() {
                return order;
            }
            (a, b) = (rest_a, rest_b);
            continue;
        }
        let (mut chars_a, mut chars_b) = (a.chars(), b.chars());
        match (chars_a.next(), chars_b.next()) {
            (None, None) => return Ordering::Equal,
            (one, other) if one != other => return one.cmp(&other),
            _ => (a, b) = (chars_a.as_str(), chars_b.as_str()),
        }
    }
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn other_loaders_are_understood() {
        let extlinux = "DEFAULT l0\nLABEL l0\n  KERNEL /vmlinuz\n  INITRD /a,/b\n  APPEND ro quiet\nLABEL x\n KERNEL /y\n";
        let entry = first_entry(extlinux).unwrap();
        assert_eq!((entry.kernel.as_str(), entry.options.as_str()), ("/vmlinuz", "ro quiet"));
        assert_eq!(entry.initrds, ["/a", "/b"]);
        // The order of lines is free there.
        let bls = "title F\noptions root=UUID=1 rw\nlinux /vmlinuz-6\ninitrd /i $tuned\n";
        let entry = first_entry(bls).unwrap();
        assert_eq!((entry.options.as_str(), entry.initrds.len()), ("root=UUID=1 rw", 1));
        assert_eq!(first_entry("blscfg\n"), None);
        assert_eq!(first_entry("linux $kernel ro\n"), None);
    }

    #[test]
    fn of_two_ways_the_first_is_taken() {
        let grub = "if [ x = y ]; then\n linux /v root=LABEL=a ro\n initrd /i\nelse\n linux /v panic=-1\n initrd /j\nfi\n";
        let entry = first_entry(grub).unwrap();
        assert_eq!(
            (entry.options.as_str(), entry.initrds),
            ("root=LABEL=a ro", vec!["/i".to_owned()])
        );
    }

    #[test]
    fn versions_are_compared_as_versions() {
        let names = ["vmlinuz-6.9.0-1", "vmlinuz-6.12.0-1", "vmlinuz-6.12", "vmlinuz-5.99"];
        let names = names.map(str::to_owned);
        assert_eq!(newest(names.iter()).unwrap(), "vmlinuz-6.12.0-1");
        assert_eq!(newest([].iter()), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in ".{0,200}", words in "(linux|initrd|options|[$/ \n\"a0-9]){0,60}") {
            let _ = (first_entry(&text), first_entry(&words));
            prop_assert_eq!(by_version(&text, &words), by_version(&words, &text).reverse());
        }
    }
}
