//! The nibble command line: the only place where errors become text for people.

mod args;
mod calibration;
mod commands;
mod engine;
mod failure;
mod foreign;
mod gpus;
mod interrupt;
mod loaded;
mod memory;
mod model;
mod modelopt;
mod profile;
mod replicas;
mod report;
mod spelling;
mod ui;

use std::process::ExitCode;

use clap::FromArgMatches;

use crate::args::{Cli, Command};
use crate::failure::{Result, Status};
use crate::ui::{Ui, tell};

fn main() -> ExitCode {
    interrupt::end_on_broken_pipe();
    interrupt::survive_file_size_limit();
    interrupt::watch();
    match cli().and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                tell(format_args!("error: {}", failure.message));
            }
            if let Some(hint) = &failure.hint {
                tell(format_args!("hint: {hint}"));
            }
            ExitCode::from(match failure.status {
                Status::No => 1,
                Status::Input => 2,
                Status::Machine => 3,
                Status::Interrupted => 130,
            })
        }
    }
}

fn cli() -> Result<Cli> {
    let matches = spelling::command().try_get_matches_from(spelling::arguments(std::env::args_os())?);
    matches.and_then(|matches| Cli::from_arg_matches(&matches)).or_else(|error| match error.print() {
        // Help and the version are results.
        Err(unwritten) if !error.use_stderr() => Err(ui::unwritten(&unwritten)),
        _ => std::process::exit(error.exit_code()),
    })
}

fn run(cli: Cli) -> Result<()> {
    let Cli { common, command } = cli;
    let ui = Ui::new(&common);
    match command {
        Command::Demo => commands::demo::run(&common, ui),
        Command::Quantize(args) => commands::quantize::run(*args, &common, ui),
        Command::Inspect(args) => commands::inspect::run(&args, ui),
        Command::Verify(args) => commands::verify::run(&args, &common, ui),
        Command::Generate(args) => commands::generate::run(&args, &common, ui),
        Command::Chat(args) => commands::chat::run(&args, &common, ui),
        Command::Serve(args) => commands::serve::run(*args, &common, ui),
        Command::Eval(args) => commands::eval::run(&args, &common, ui),
        Command::Bench(args) => commands::bench::run(&args, &common, ui),
        Command::Doctor => commands::doctor::run(&common, ui),
        Command::Tokens(args) => commands::tokens::run(&args, ui),
        Command::Harmony(args) => commands::harmony::run(&args, ui),
        Command::Logits(args) => commands::logits::run(&args, &common, ui),
    }
}
