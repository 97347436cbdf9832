//! The nibble command line: the only place where errors become text for people.
#![allow(clippy::print_stdout, reason = "the results of commands go to standard output")]

mod args;
mod calibration;
mod commands;
mod engine;
mod failure;
mod interrupt;
mod loaded;
mod model;
mod modelopt;
mod report;
mod ui;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::failure::{Result, Status};
use crate::ui::Ui;

fn main() -> ExitCode {
    interrupt::restore_broken_pipe();
    let cli = Cli::parse_from(args::with_kebab_case(std::env::args_os()));
    interrupt::watch();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("error: {}", failure.message);
            }
            if let Some(hint) = &failure.hint {
                eprintln!("hint: {hint}");
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

fn run(cli: Cli) -> Result<()> {
    let Cli { common, command } = cli;
    let ui = Ui::new(&common);
    match command {
        Command::Demo => commands::demo::run(&common, ui),
        Command::Quantize(args) => commands::quantize::run(*args, &common, ui),
        Command::Inspect(args) => commands::inspect::run(&args, ui),
        Command::Verify(args) => commands::verify::run(&args, ui),
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
