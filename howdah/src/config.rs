//! The daemon's settings: flags before the environment, that before the configuration file, that
//! before what is built in.
//!
//! There is one list of them, the flags of `howdah serve` ([`Settings`]): a setting's name, its
//! environment variable, what it may be and what it means are said there once.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgMatches, Args, CommandFactory, FromArgMatches, parser::ValueSource};
use serde::Serialize;

use crate::{
    cli::{Cli, ConfigCommand, ServeArgs, Settings, usage_failure},
    failure::{Exit, Failure},
    home::Home,
    output::Output,
};

/// Where the configuration is if the home directory has none.
const SYSTEM_FILE: &str = "/etc/howdah/howdah.toml";
/// That of a home directory.
const HOME_FILE: &str = "howdah.toml";
/// No configuration file is longer.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum From {
    /// A flag.
    Flag,
    /// The environment.
    Environment,
    /// The configuration file.
    File,
    /// Nothing was said.
    Default,
}

/// One setting, as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Setting {
    /// Its name in the file, `SECTION.KEY`.
    pub(crate) key: String,
    /// Its value; none where nothing was said and nothing is built in.
    pub(crate) value: Option<String>,
    /// Where that comes from.
    pub(crate) from: From,
    /// The flag.
    flag: String,
    /// The environment variable.
    environment: String,
    /// What it means.
    help: String,
}

/// All settings, and the file that they come from in part.
#[derive(Debug, Serialize)]
pub(crate) struct Resolved {
    /// The configuration file, if there is one.
    pub(crate) file: Option<PathBuf>,
    /// Each setting.
    pub(crate) settings: Vec<Setting>,
}

/// What was said on the command line and in the environment, with where.
struct Said(ArgMatches);

impl Said {
    /// By this process's own arguments.
    fn by_this_process() -> Result<Self, Failure> {
        let matches = Cli::command().try_get_matches_from(std::env::args_os());
        let mut matches = matches.map_err(|e| usage_failure(&e))?;
        while let Some((_, deeper)) = matches.remove_subcommand() {
            matches = deeper;
        }
        Ok(Self(matches))
    }

    fn of(&self, id: &str) -> Option<(From, OsString)> {
        let from = match self.0.value_source(id)? {
            ValueSource::CommandLine => From::Flag,
            ValueSource::EnvVariable => From::Environment,
            _ => return None,
        };
        Some((from, self.0.get_raw(id)?.next()?.to_owned()))
    }
}

/// Settles what the settings are.
pub(crate) fn resolve(args: &ServeArgs, home: &Home) -> Result<(Settings, Resolved), Failure> {
    let file = find(args.config.as_deref(), home);
    let written = match &file {
        Some(path) => read(path)?,
        None => BTreeMap::new(),
    };
    settle(&Said::by_this_process()?, file, &written)
}

fn settle(
    said: &Said,
    file: Option<PathBuf>,
    written: &BTreeMap<String, String>,
) -> Result<(Settings, Resolved), Failure> {
    let mut words = Vec::new();
    let mut settings = Vec::new();
    for arg in arguments() {
        let (id, flag) = (arg.get_id().as_str(), flag(&arg));
        let written = written.get(&key(id)).map(|value| (From::File, OsString::from(value)));
        let found = said.of(id).or(written);
        let built_in = arg.get_default_values().first();
        let (from, value) = match found {
            Some((from, value)) => {
                let mut word = OsString::from(format!("{flag}="));
                word.push(&value);
                words.push(word);
                (from, Some(value))
            }
            None => (From::Default, built_in.map(|value| value.into())),
        };
        settings.push(Setting {
            key: key(id),
            value: value.map(|value| value.to_string_lossy().into_owned()),
            from,
            flag,
            environment: arg.get_env().unwrap_or_default().to_string_lossy().into_owned(),
            help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
        });
    }
    let matches = command().try_get_matches_from(words).map_err(|e| usage_failure(&e))?;
    let parsed = Settings::from_arg_matches(&matches).map_err(|e| usage_failure(&e))?;
    Ok((parsed, Resolved { file, settings }))
}

/// The settings alone, as a command.
fn command() -> clap::Command {
    Settings::augment_args(clap::Command::new("howdah serve").no_binary_name(true))
}

fn arguments() -> Vec<Arg> {
    command().get_arguments().filter(|arg| arg.get_env().is_some()).cloned().collect()
}

fn flag(arg: &Arg) -> String {
    format!("--{}", arg.get_long().unwrap_or_default())
}

/// The name of a setting in the file.
fn key(id: &str) -> String {
    id.replacen('_', ".", 1)
}

/// The file that was named, or the first that is there.
fn find(named: Option<&Path>, home: &Home) -> Option<PathBuf> {
    let usual = [home.root().join(HOME_FILE), PathBuf::from(SYSTEM_FILE)];
    named.map(Path::to_path_buf).or_else(|| usual.into_iter().find(|path| path.exists()))
}

fn read(path: &Path) -> Result<BTreeMap<String, String>, Failure> {
    use io::Read;
    let failed = |e: io::Error| Failure::file("read", path, &e);
    let mut text = String::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(failed)?;
    parse(&text).map_err(|why| {
        let way_out = "`howdah config show` explains every setting";
        Failure::new(Exit::Usage, path.display(), why, way_out)
    })
}

/// Reads a file, and checks every value by itself, so that what is wrong is told with its name.
fn parse(text: &str) -> Result<BTreeMap<String, String>, String> {
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
    let known = arguments();
    let mut written = BTreeMap::new();
    for (section, settings) in table {
        let toml::Value::Table(settings) = settings else {
            return Err(format!("{section} is no section: settings are in sections, as in [api]"));
        };
        for (name, value) in settings {
            let key = format!("{section}.{name}");
            let arg = known.iter().find(|arg| self::key(arg.get_id().as_str()) == key);
            let arg = arg.ok_or_else(|| format!("{key} is no setting"))?;
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(flag) => flag.to_string(),
                other => return Err(format!("{key} cannot be a {}", other.type_str())),
            };
            let word = format!("{}={value}", flag(arg));
            command().try_get_matches_from([word]).map_err(|e| {
                let said = usage_failure(&e).message;
                format!("{key}: {}", said.split(';').next().unwrap_or_default())
            })?;
            written.insert(key, value);
        }
    }
    Ok(written)
}

/// Runs `howdah config`.
pub(crate) fn run(command: ConfigCommand, home: &Home, output: Output) -> anyhow::Result<()> {
    match command {
        ConfigCommand::Show(args) => {
            let (_, resolved) = resolve(&args, home)?;
            output.result(&resolved, shown);
        }
        ConfigCommand::Example => {
            let text = example();
            output.result(&text, String::clone);
        }
    }
    Ok(())
}

fn shown(resolved: &Resolved) -> String {
    let file = resolved.file.as_ref().map_or("none".into(), |file| file.display().to_string());
    let mut lines = vec![format!("configuration file: {file}")];
    for setting in &resolved.settings {
        let from = match setting.from {
            From::Flag => "flag",
            From::Environment => "environment",
            From::File => "file",
            From::Default => "default",
        };
        let value = setting.value.as_deref().unwrap_or("not set");
        lines.push(format!("\n{} = {value}  ({from})", setting.key));
        lines.push(format!("    {}", setting.help.replace('\n', " ")));
        lines.push(format!("    {}, {}", setting.flag, setting.environment));
    }
    lines.join("\n")
}

/// A configuration file that says nothing, with all that could be said.
fn example() -> String {
    let mut text =
        "# Settings of `howdah serve`. Flags and the environment come first.\n".to_owned();
    let mut section = String::new();
    for arg in arguments() {
        let key = key(arg.get_id().as_str());
        let Some((of, name)) = key.split_once('.') else { continue };
        if of != section {
            section = of.to_owned();
            text += &format!("\n[{section}]\n");
        }
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let value = arg.get_default_values().first().map(|value| value.to_string_lossy());
        let value = match value.as_deref() {
            Some(value) if value.parse::<u64>().is_ok() || value == "false" => value.to_owned(),
            Some(value) => format!("{value:?}"),
            None => "...".to_owned(),
        };
        text += &format!("# {}\n#{name} = {value}\n", help.replace('\n', " "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(words: &[&str]) -> Said {
        Said(command().try_get_matches_from(words).unwrap())
    }

    fn find<'a>(resolved: &'a Resolved, key: &str) -> &'a Setting {
        resolved.settings.iter().find(|setting| setting.key == key).unwrap()
    }

    #[test]
    fn flags_come_before_the_file_and_that_before_what_is_built_in() {
        let written = parse(
            "[receive]\nlisten = \"10.0.0.1:7070\"\nmin_free_mib = 7\n[vm]\nno_jail = true\n",
        )
        .unwrap();
        let (settings, resolved) =
            settle(&said(&["--receive-min-free-mib=9"]), None, &written).unwrap();
        assert_eq!(settings.receive_min_free_mib, 9);
        assert_eq!(settings.receive_listen, "10.0.0.1:7070".parse().ok());
        assert!(settings.vm_no_jail && settings.receive().is_some());
        assert_eq!(settings.api_socket_mode, 0o600);
        assert_eq!(find(&resolved, "receive.min_free_mib").from, From::Flag);
        assert_eq!(find(&resolved, "receive.listen").from, From::File);
        let mode = find(&resolved, "api.socket_mode");
        assert_eq!((mode.from, mode.value.as_deref()), (From::Default, Some("600")));
        assert!(shown(&resolved).contains("receive.min_free_mib = 9  (flag)"));
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        for (text, says) in [
            ("[api]\nsoket = \"x\"", "api.soket is no setting"),
            ("listen = 1", "listen is no section"),
            ("[receive]\nworkers = 9", "receive.workers: "),
            ("[receive]\nlisten = \"here\"", "receive.listen: "),
            ("[receive]\ntap = [1]", "receive.tap cannot be a array"),
            ("[receive", "TOML parse error"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
    }

    #[test]
    fn every_setting_is_explained_and_has_all_three_ways() {
        for arg in command().get_arguments() {
            let id = arg.get_id().as_str();
            assert!(arg.get_env().is_some(), "{id} has no environment variable");
            assert!(arg.get_help().is_some_and(|help| help.to_string().len() > 20), "{id}");
            assert_eq!(arg.get_long(), Some(id.replace('_', "-").as_str()));
            assert!(["api", "receive", "vm"].contains(&id.split('_').next().unwrap()), "{id}");
        }
        assert!(parse(&example()).unwrap().is_empty());
    }
}
