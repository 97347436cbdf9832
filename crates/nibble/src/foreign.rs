//! vLLM's flags that `serve` does not have: accepted where they change nothing, refused with a reason where they would.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::failure::{Failure, Result};

/// What follows a flag.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Value,
    /// One or more.
    Values,
}

/// What becomes of a flag.
#[derive(Clone, Copy)]
enum Fate {
    /// It changes nothing here; the text says why.
    Ignored(&'static str),
    /// It changes nothing with this value, and cannot be had with others; the text is the rest of the sentence.
    Only(&'static [&'static str], &'static str),
    /// It cannot be had; the text is the rest of the sentence.
    Refused(&'static str),
}

use Fate::{Ignored, Only, Refused};
use Takes::{Nothing, Value, Values};

const HARMONY: &str = "Harmony is built in and always parsed";
const PYTHON: &str = "Python extensions are not supported";
const LORA: &str = "adapters are not supported in this version";
const GRAPHS: &str = "kernels are compiled and graphs captured as the device needs";
const EXPERTS: &str =
    "GPUs share every expert, so that all have the same work: --tensor-parallel-size says how many";
const NODES: &str = "one machine serves a model; put several behind a gateway";

const FLAGS: &[(&str, Takes, Fate)] = &[
    ("trust-remote-code", Nothing, Ignored("no code of a model's repository is ever run")),
    (
        "dtype",
        Value,
        Only(&["auto", "bfloat16", "float16", "float32"], "the device's kernels fix the type of activations"),
    ),
    ("tokenizer-mode", Value, Ignored("there is one tokenizer")),
    ("load-format", Value, Only(&["auto", "safetensors"], "models are safetensors")),
    ("pipeline-parallel-size", Value, Only(&["1"], "there is one stage in this version")),
    ("enable-expert-parallel", Nothing, Refused(EXPERTS)),
    ("enable-eplb", Nothing, Refused(EXPERTS)),
    ("eplb-config", Value, Refused(EXPERTS)),
    (
        "distributed-executor-backend",
        Value,
        Only(&["mp", "uni"], "the engine is a thread of this process; Ray is not needed"),
    ),
    ("swap-space", Value, Ignored("sequences start over from the prefix cache instead")),
    ("block-size", Value, Only(&["16"], "blocks have 16 tokens")),
    ("prefix-caching-hash-algo", Value, Only(&["sha256"], "blocks are found by a cryptographic hash")),
    ("enable-chunked-prefill", Nothing, Ignored("prompts are always cut into chunks")),
    ("no-enable-chunked-prefill", Nothing, Ignored("prompts are always cut into chunks")),
    ("cudagraph-capture-sizes", Values, Ignored(GRAPHS)),
    ("max-cudagraph-capture-size", Value, Ignored(GRAPHS)),
    ("compilation-config", Value, Ignored(GRAPHS)),
    ("optimization-level", Value, Ignored(GRAPHS)),
    ("reasoning-parser", Value, Ignored(HARMONY)),
    ("tool-call-parser", Value, Ignored(HARMONY)),
    ("enable-auto-tool-choice", Nothing, Ignored(HARMONY)),
    ("chat-template", Value, Ignored(HARMONY)),
    ("trust-request-chat-template", Nothing, Ignored(HARMONY)),
    ("default-chat-template-kwargs", Value, Ignored(HARMONY)),
    ("chat-template-content-format", Value, Ignored(HARMONY)),
    ("tool-server", Value, Ignored("tools are run by clients")),
    ("spec-model", Value, Refused("guesses come from what was said before, not from a second model")),
    ("enable-lora", Nothing, Refused(LORA)),
    ("lora-modules", Values, Refused(LORA)),
    ("max-loras", Value, Refused(LORA)),
    ("max-lora-rank", Value, Refused(LORA)),
    ("otlp-traces-endpoint", Value, Ignored("the server opens no outbound connection")),
    ("collect-detailed-traces", Values, Ignored("the server opens no outbound connection")),
    ("disable-log-requests", Nothing, Ignored("prompts are not logged unless --enable-log-requests")),
    ("disable-access-log-for-endpoints", Value, Ignored("probes are not logged")),
    ("uvicorn-log-level", Value, Ignored("--log-level counts")),
    ("disable-uvicorn-access-log", Nothing, Ignored("--log-level counts")),
    ("disable-frontend-multiprocessing", Nothing, Ignored("there is one process")),
    ("api-server-count", Value, Ignored("there is one process")),
    ("enable-request-id-headers", Nothing, Ignored("they are always there")),
    ("enable-prompt-tokens-details", Nothing, Ignored("they are always there")),
    ("enable-server-load-tracking", Nothing, Ignored("/load is always there")),
    ("return-tokens-as-token-ids", Nothing, Refused("requests ask for it by return_tokens_as_token_ids")),
    ("middleware", Values, Refused(PYTHON)),
    ("tool-parser-plugin", Value, Refused(PYTHON)),
    ("reasoning-parser-plugin", Value, Refused(PYTHON)),
    ("worker-cls", Value, Refused(PYTHON)),
    ("worker-extension-cls", Value, Refused(PYTHON)),
    ("logits-processors", Values, Refused(PYTHON)),
    ("nnodes", Value, Only(&["1"], NODES)),
    ("node-rank", Value, Only(&["0"], NODES)),
    ("master-addr", Value, Ignored("there is one machine")),
    ("master-port", Value, Ignored("there is one machine")),
    ("headless", Nothing, Refused(NODES)),
    ("data-parallel-rank", Value, Refused(NODES)),
    ("data-parallel-address", Value, Refused(NODES)),
    ("data-parallel-rpc-port", Value, Refused(NODES)),
    ("data-parallel-backend", Value, Ignored("the engines are threads of this process")),
    ("data-parallel-size-local", Value, Only(&["1"], NODES)),
];

/// The flags of that kind that were given, as they were typed.
#[derive(Debug, Default)]
pub(crate) struct Foreign(Vec<(&'static str, Vec<String>)>);

impl Foreign {
    /// What was given and changes nothing, for people.
    ///
    /// # Errors
    /// What was given and cannot be had.
    pub(crate) fn ignored(&self) -> Result<Vec<String>> {
        let mut ignored = Vec::new();
        for (name, values) in &self.0 {
            let Some((_, _, fate)) = FLAGS.iter().find(|(known, ..)| known == name) else { continue };
            let strange = |allowed: &[&str]| values.iter().find(|v| !allowed.contains(&v.as_str())).cloned();
            match *fate {
                Ignored(why) => ignored.push(format!("--{name} ({why})")),
                Refused(why) => return Err(Failure::input(format!("--{name}: {why}"))),
                Only(allowed, why) => match strange(allowed) {
                    None => ignored.push(format!("--{name} ({why})")),
                    Some(found) => {
                        let expected = allowed.join(" or ");
                        return Err(Failure::input(format!(
                            "--{name}: expected {expected}, since {why}, found {found}"
                        )));
                    }
                },
            }
        }
        Ok(ignored)
    }
}

impl Args for Foreign {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, &(name, takes, _)| {
            let arg = Arg::new(name).long(name).hide(true);
            command.arg(match takes {
                Nothing => arg.action(ArgAction::SetTrue),
                Value => arg.num_args(1).allow_hyphen_values(true),
                Values => arg.num_args(1..).action(ArgAction::Append),
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Foreign::augment_args(command)
    }
}

impl FromArgMatches for Foreign {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Foreign, clap::Error> {
        let mut given = Foreign::default();
        given.update_from_arg_matches(matches)?;
        Ok(given)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        for &(name, takes, _) in FLAGS {
            if takes == Nothing && matches.get_flag(name) {
                self.0.push((name, Vec::new()));
            } else if takes != Nothing
                && let Some(values) = matches.get_many::<String>(name)
            {
                self.0.push((name, values.cloned().collect()));
            }
        }
        Ok(())
    }
}
