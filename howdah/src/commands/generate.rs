//! `howdah completion` and `howdah man`: what shells and readers get of the grammar in `cli`.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::{cli::Cli, failure::Failure, output::Output};

/// The section of commands that administrators run.
const SECTION: &str = "8";
const MANUAL: &str = "howdah manual";

/// Runs `howdah completion`.
pub(crate) fn completion(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut grammar(), "howdah", &mut script);
    // Nobody reads on: no failure.
    let _ = std::io::stdout().write_all(&script);
    Ok(())
}

/// Runs `howdah man`.
pub(crate) fn man(dir: &Path, output: Output) -> anyhow::Result<()> {
    fs::create_dir_all(dir).map_err(|e| Failure::file("create", dir, &e))?;
    let mut written = Vec::new();
    for (name, page) in pages() {
        let path = dir.join(format!("{name}.{SECTION}"));
        fs::write(&path, page).map_err(|e| Failure::file("write", &path, &e))?;
        written.push(path);
    }
    output.done(&written, |written: &Vec<PathBuf>| {
        let (count, dir) = (written.len(), dir.display());
        format!("{count} pages are in {dir}: `man -l {dir}/howdah.{SECTION}`")
    });
    Ok(())
}

/// The grammar without what commands start for themselves: a word that nobody is to type is not
/// completed either.
fn grammar() -> Command {
    let all = Cli::command();
    let shown: Vec<Command> =
        all.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    let bare = Cli::command();
    let mut grammar = Command::new("howdah")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .subcommands(shown);
    if let Some(about) = bare.get_about() {
        grammar = grammar.about(about.clone());
    }
    if let Some(about) = bare.get_long_about() {
        grammar = grammar.long_about(about.clone());
    }
    if let Some(help) = bare.get_after_help() {
        grammar = grammar.after_help(help.clone());
    }
    let arguments =
        bare.get_arguments().filter(|a| !matches!(a.get_id().as_str(), "help" | "version"));
    grammar.args(arguments.cloned().collect::<Vec<_>>())
}

/// Every page by its name, `howdah-vm-run` for `howdah vm run`.
fn pages() -> Vec<(String, Vec<u8>)> {
    let mut grammar = grammar().disable_help_subcommand(true);
    grammar.build();
    let mut pages = Vec::new();
    collect(&grammar, "howdah", &mut pages);
    pages
}

fn collect(command: &Command, name: &str, pages: &mut Vec<(String, Vec<u8>)>) {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        collect(sub, &format!("{name}-{}", sub.get_name()), pages);
    }
    let command = command.clone().display_name(name.to_owned()).version(env!("CARGO_PKG_VERSION"));
    let page = Man::new(command.disable_help_subcommand(true))
        .title(name.to_uppercase())
        .section(SECTION)
        .manual(MANUAL)
        .source(concat!("howdah ", env!("CARGO_PKG_VERSION")));
    let mut text = Vec::new();
    if page.render(&mut text).is_ok() {
        pages.push((name.to_owned(), text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let pages = pages();
        let text = |name: &str| {
            let page = pages.iter().find(|(page, _)| page == name);
            String::from_utf8(page.unwrap_or_else(|| panic!("no page {name}")).1.clone()).unwrap()
        };
        for name in ["howdah", "howdah-vm", "howdah-vm-run", "howdah-handoff", "howdah-base-import"]
        {
            assert!(text(name).starts_with(".ie \\n(.g"), "{name}");
        }
        assert!(text("howdah-vm-run").contains("memory\\-mib"));
        assert!(text("howdah").contains("Exit codes"));
        assert!(!pages.iter().any(|(name, _)| name.contains("process")), "hidden ones have none");
    }

    #[test]
    fn shells_complete_what_may_be_typed() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut grammar(), "howdah", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("handoff") && script.contains("memory-mib"), "{shell}");
            assert!(!script.contains("vm-process"), "{shell}");
        }
    }
}
