//! Command lines as users of other programs write them, and flags from a file, turned into what `args.rs` defines.

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};

use checkpoint::hub::is_hub_name;
use clap::builder::Resettable;
use clap::error::ErrorKind;
use clap::{ArgAction, ArgMatches, Command, CommandFactory};

use crate::args::{Cli, MOST_ANSWERS};
use crate::failure::{Failure, Result};

/// vLLM's short flags of more than one letter.
const SHORT: [(&str, &str); 7] = [
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-dp", "--data-parallel-size"),
    ("-cc", "--compilation-config"),
    ("-sc", "--speculative-config"),
    ("-n", "--nnodes"),
    ("-r", "--node-rank"),
];

/// Why a variable that is set does not count, if that is so: an empty one is as good as none, and some of vLLM's are for its own
/// traffic, or have larger values.
fn left_out(variable: &str, value: &OsStr) -> Option<&'static str> {
    let text = value.to_str().unwrap_or_default();
    match variable {
        _ if value.is_empty() => Some("it is empty"),
        "VLLM_PORT" if text.contains("://") => {
            Some("expected a port, found what Kubernetes says of a service with the name vllm")
        }
        "VLLM_HOST_IP"
            if !text.parse::<IpAddr>().is_ok_and(|address| UdpSocket::bind((address, 0)).is_ok()) =>
        {
            Some("expected an address of this machine, found none")
        }
        "VLLM_MAX_N_SEQUENCES" if text.parse().is_ok_and(|most: u64| most > MOST_ANSWERS) => {
            Some("--max-n is as large as it can be")
        }
        _ => None,
    }
}

/// The variables that were set for something else, with why they do not count.
pub(crate) fn ignored_variables() -> Vec<String> {
    let found = ["VLLM_HOST_IP", "VLLM_PORT", "VLLM_MAX_N_SEQUENCES"].map(|name| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
        Some(format!("{name} ({})", left_out(name, &value)?))
    });
    found.into_iter().flatten().collect()
}

/// The command line's definition: without variables that do not count, and with a `--no-NAME` for each switch of `serve` that
/// has none.
pub(crate) fn command() -> Command {
    Cli::command().mut_subcommand("serve", |serve| {
        let serve = serve.mut_args(|arg| {
            let set = arg.get_env().and_then(|name| Some((name.to_str()?, std::env::var_os(name)?)));
            match set.is_some_and(|(name, value)| left_out(name, &value).is_some()) {
                true => arg.env(Resettable::Reset),
                false => arg,
            }
        });
        let known = |name: &str| serve.get_arguments().any(|arg| arg.get_long() == Some(name));
        let switches: Vec<(String, String)> = serve
            .get_arguments()
            .filter(|arg| matches!(arg.get_action(), ArgAction::SetTrue))
            .filter_map(|arg| Some((arg.get_id().to_string(), arg.get_long()?.to_owned())))
            .filter(|(_, name)| !name.starts_with("no-") && !known(&format!("no-{name}")))
            .collect();
        switches.into_iter().fold(serve, |serve, (id, name)| {
            let name = format!("no-{name}");
            let arg = clap::Arg::new(name.clone()).long(name).action(ArgAction::SetTrue).hide(true);
            serve.arg(arg.overrides_with(id))
        })
    })
}

/// The arguments as `args.rs` defines them.
///
/// # Errors
/// A file of flags that cannot be used.
pub(crate) fn arguments(args: impl Iterator<Item = OsString>) -> Result<Vec<OsString>> {
    let args: Vec<OsString> = args.collect();
    let is_serve = serve(&args).is_some();
    let args = with_long_names(args, is_serve);
    let args = match serve(&args).and_then(|mut serve| serve.remove_one::<PathBuf>("config")) {
        Some(path) => with_file(args, &path)?,
        None => args,
    };
    if let Some(matches) = serve(&args) {
        model_is_no_value(&args, &matches)?;
        check_variables(&args)?;
    }
    Ok(args)
}

/// Refuses a variable that is no value of its flag, by its own name: nobody has typed the flag.
fn check_variables(args: &[OsString]) -> Result<()> {
    let command = command();
    let serve = command.find_subcommand("serve").expect("serve is a command");
    for arg in serve.get_arguments() {
        let (Some(flag), Some(variable)) = (arg.get_long(), arg.get_env()) else { continue };
        let Some(value) = std::env::var_os(variable) else { continue };
        let flag = format!("--{flag}");
        let given = |word: &OsString| word.to_str().is_some_and(|word| word.split('=').next() == Some(&flag));
        if args.iter().any(given) {
            continue;
        }
        let mut word = OsString::from(format!("{flag}="));
        word.push(value);
        if let Some(wrong) = wrong(&[word]) {
            return Err(Failure::input(format!("{}: {wrong}", variable.to_string_lossy())));
        }
    }
    Ok(())
}

/// Why flags of `serve` cannot be used, whatever others there are: the parser's first line.
fn wrong(flags: &[OsString]) -> Option<String> {
    let bare = |serve: Command| serve.mut_args(|arg| arg.env(Resettable::Reset));
    let words = ["nibble", "serve"].map(OsString::from).into_iter().chain(flags.iter().cloned());
    let error = command().mut_subcommand("serve", bare).try_get_matches_from(words).err()?;
    if matches!(error.kind(), ErrorKind::MissingRequiredArgument | ErrorKind::ArgumentConflict) {
        return None;
    }
    let text = error.to_string();
    Some(text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned())
}

/// What the parser makes of a command line of `serve`, as far as it understands it; `None` of any other.
fn serve(args: &[OsString]) -> Option<ArgMatches> {
    let mut matches = command().ignore_errors(true).try_get_matches_from(args).ok()?;
    matches.remove_subcommand().filter(|(name, _)| name == "serve").map(|(_, serve)| serve)
}

/// Refuses a command line of `serve` without a model, where a flag that takes several values has one for its last value: the
/// built-in model would be served in its place.
fn model_is_no_value(args: &[OsString], matches: &ArgMatches) -> Result<()> {
    let scripted = matches.get_one::<String>("engine").is_some_and(|engine| engine != "auto");
    if scripted || matches.contains_id("model") || matches.contains_id("model_flag") {
        return Ok(());
    }
    let command = command();
    let serve = command.find_subcommand("serve").expect("serve is a command");
    let several = serve.get_arguments().filter(|arg| arg.get_num_args().is_some_and(|n| n.max_values() > 1));
    for (id, name) in several.filter_map(|arg| Some((arg.get_id().as_str(), arg.get_long()?))) {
        for mut values in matches.get_raw_occurrences(id).into_iter().flatten() {
            // Many a name is that of a model on the hub, but who gives one alone means it.
            let may_be_on_hub = id != "served_model_name" || values.len() > 1;
            let Some(last) = values.next_back().filter(|last| args.iter().any(|arg| arg == last)) else {
                continue;
            };
            let is_folder = Path::new(last).join("config.json").is_file();
            if is_folder || may_be_on_hub && last.to_str().is_some_and(is_hub_name) {
                return Err(Failure::input(format!(
                    "--{name}: expected MODEL before this flag, or as --model, found it as the flag's last value"
                ))
                .hint(format!("--{name}=VALUE takes one value and leaves the next word alone")));
            }
        }
    }
    Ok(())
}

/// `--snake_case` flags in `--kebab-case`, and those of `serve` that are several letters in full.
fn with_long_names(args: Vec<OsString>, serve: bool) -> Vec<OsString> {
    let mut literal = false;
    args.into_iter()
        .flat_map(|arg| {
            literal |= arg == "--";
            let Some(text) = arg.to_str().filter(|_| !literal) else { return vec![arg] };
            let (name, value) =
                text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
            let name = if serve && let Some((_, long)) = SHORT.iter().find(|(short, _)| *short == name) {
                (*long).to_owned()
            } else if serve && let Some(level) = name.strip_prefix("-O").filter(|level| level.len() == 1) {
                return vec!["--optimization-level".into(), level.into()];
            } else if name.starts_with("--") {
                name.replace('_', "-")
            } else {
                return vec![arg];
            };
            vec![value.map_or(name.clone(), |value| format!("{name}={value}")).into()]
        })
        .collect()
}

/// With the flags of `--config`'s file that the command line does not have.
fn with_file(args: Vec<OsString>, path: &Path) -> Result<Vec<OsString>> {
    let words: Vec<&str> = args.iter().map(|arg| arg.to_str().unwrap_or_default()).collect();
    let file = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::input(format!("--config: {file}: expected a file of flags, found: {e}")))?;
    let fail = |what: String| Failure::input(format!("--config: {file}: {what}"));
    let flags: serde_yaml_ng::Mapping = serde_yaml_ng::from_str(&text)
        .map_err(|e| fail(format!("expected a YAML map of flags, found: {e}")))?;

    let command = command();
    let serve = command.find_subcommand("serve").expect("serve is a command");
    let known = |name: &str| serve.get_arguments().any(|arg| arg.get_long() == Some(name));
    let mut added = Vec::new();
    for (key, value) in &flags {
        let key = key.as_str().ok_or_else(|| fail(format!("expected a flag's name, found {key:?}")))?;
        let name = key.trim_start_matches('-').replace('_', "-");
        let arg = serve.get_arguments().chain(command.get_arguments()).find(|arg| {
            arg.get_long() == Some(&name)
                || arg.get_all_aliases().is_some_and(|all| all.contains(&name.as_str()))
        });
        let switch = arg.is_some_and(|arg| matches!(arg.get_action(), ArgAction::SetTrue));
        let same = |word: &str| match switch {
            // The command line may have the switch the other way round.
            true => word.trim_start_matches("no-") == name.trim_start_matches("no-"),
            false => word == name,
        };
        let given = |word: &str| {
            let word = word.split('=').next().unwrap_or_default();
            let short = arg.and_then(|arg| arg.get_short());
            word.strip_prefix("--").is_some_and(same)
                || short.is_some_and(|short| word == format!("-{short}"))
        };
        if words.iter().copied().any(given) {
            continue;
        }
        let flags = match truth(value).filter(|_| switch) {
            Some(true) => vec![format!("--{name}").into()],
            Some(false) if known(&format!("no-{name}")) => vec![format!("--no-{name}").into()],
            Some(false) => Vec::new(),
            None => flag(&name, value).map_err(|found| {
                fail(format!("{key}: expected a value or a list of values, found {found}"))
            })?,
        };
        if let Some(wrong) = wrong(&flags) {
            return Err(fail(format!("{key}: {wrong}")));
        }
        added.extend(flags);
    }
    let mut all = args;
    all.extend(added);
    Ok(all)
}

/// Whether a switch is on, also in the words of YAML 1.1, which vLLM reads.
fn truth(value: &serde_yaml_ng::Value) -> Option<bool> {
    match value {
        serde_yaml_ng::Value::Bool(on) => Some(*on),
        serde_yaml_ng::Value::String(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" => Some(true),
            "false" | "no" | "off" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// A flag as it is typed; the error is what was found instead of a value.
fn flag(name: &str, value: &serde_yaml_ng::Value) -> std::result::Result<Vec<OsString>, &'static str> {
    use serde_yaml_ng::Value;
    let typed = |value: &str| OsString::from(format!("--{name}={value}"));
    let one = |value: &Value| match value {
        Value::Bool(value) => Ok(value.to_string()),
        Value::Number(value) => Ok(value.to_string()),
        Value::String(value) => Ok(value.clone()),
        Value::Mapping(_) => serde_json::to_string(value).map_err(|_| "a map that is not JSON"),
        Value::Sequence(_) => Err("a list"),
        Value::Null | Value::Tagged(_) => Err("nothing"),
    };
    match value {
        Value::Null => Ok(Vec::new()),
        // Lists that are JSON on the command line.
        Value::Sequence(_) if name.starts_with("allowed-") => {
            serde_json::to_string(value).map(|json| vec![typed(&json)]).map_err(|_| "a list that is not JSON")
        }
        Value::Sequence(values) => values.iter().map(|value| one(value).map(|value| typed(&value))).collect(),
        value => one(value).map(|value| vec![typed(&value)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn other_spellings_are_understood() {
        let args =
            ["nibble", "serve", "--max_model_len=3", "-tp", "1", "-O2", "--api_key", "a_b", "--", "--x_y"];
        let expected = [
            "nibble",
            "serve",
            "--max-model-len=3",
            "--tensor-parallel-size",
            "1",
            "--optimization-level",
            "2",
            "--api-key",
            "a_b",
            "--",
            "--x_y",
        ];
        assert_eq!(arguments(args.iter().map(OsString::from)).unwrap(), expected);
        // Other commands have short flags of their own, whatever their texts say.
        for other in [&["nibble", "bench", "-n", "3"][..], &["nibble", "bench", "-p", "serve", "-n", "3"]] {
            assert_eq!(arguments(other.iter().map(OsString::from)).unwrap(), other);
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flags.yaml");
        std::fs::write(
            &path,
            "model: some/model\nport: 1\nhost: 0.0.0.0\napi_key: [a, b]\nallowed-origins: ['*']\n\
             enable-log-requests: true\nenable_prefix_caching: false\ndev-mode: no\nprofile: on\n\
             disable-log-stats: true\noverride-generation-config: {temperature: 0.5}\n",
        )
        .unwrap();
        let path = path.to_str().unwrap();
        let typed =
            ["nibble", "serve", "--port", "2", "--config", path, "--host=::1", "--no-disable-log-stats"];
        let found = arguments(typed.iter().map(OsString::from)).unwrap();
        let found: Vec<&str> = found.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(found[..8], typed);
        assert_eq!(
            found[8..],
            [
                "--model=some/model",
                "--api-key=a",
                "--api-key=b",
                "--allowed-origins=[\"*\"]",
                "--enable-log-requests",
                "--no-enable-prefix-caching",
                "--no-dev-mode",
                "--profile",
                "--override-generation-config={\"temperature\":0.5}"
            ]
        );
        assert!(command().try_get_matches_from(&found).is_ok());
        // Wherever else flags stand, and where one on the command line needs one in the file.
        for args in [
            &["nibble", "--threads", "1", "serve", "--config", path][..],
            &["nibble", "--json", "--device=cpu", "serve", &format!("--config={path}"), "-tp", "1"],
            &["nibble", "--device", "cpu", "serve", "--fingerprint-mode", "custom", "--config", path],
        ] {
            let found = arguments(args.iter().map(OsString::from)).unwrap();
            assert!(found.contains(&OsString::from("--api-key=a")), "{found:?}");
        }
        let error = |args: &[&str]| arguments(args.iter().map(OsString::from)).unwrap_err().message;
        assert!(error(&["nibble", "serve", "--config", "/nowhere.yaml"]).contains("/nowhere.yaml"));
        assert!(
            error(&["nibble", "--threads", "1", "serve", "--config", "/nowhere.yaml"]).contains("nowhere")
        );
        for (text, found) in [
            ("- a\n", ": expected a YAML map of flags"),
            ("bogus: 1\n", ": bogus: unexpected argument '--bogus'"),
            (
                "port: 2\nmax_num_seqs: many\n",
                ": max_num_seqs: invalid value 'many' for '--max-num-seqs <N>'",
            ),
            ("dev-mode: maybe\n", ": dev-mode: unexpected value 'maybe' for '--dev-mode'"),
        ] {
            std::fs::write(path, text).unwrap();
            let error = error(&["nibble", "serve", "--config", path]);
            assert!(error.starts_with(&format!("--config: {path}{found}")), "{error}");
        }
    }
}
