//! Functions called for real: this test binary is started again, as a host would start it.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use bytes::Bytes;
use millstream_common::spec::{FilePlace, FileSource, OutputDescriptors};

use crate::{
    Block, BlockContext, BlockResult,
    block::compile::{Compiled, Surroundings},
    definition::Defaults,
};

crate::entry!();

/// Prints what it was given.
#[crate::block]
fn greet(
    ctx: &mut BlockContext,
    mut name: String,
    times: u8,
    extra: Option<(f64, Vec<String>)>,
) -> BlockResult {
    name.push('!');
    for _ in 0..times {
        println!("hello {name} {extra:?}");
    }
    ctx.whiteboard(format_args!("on {}", ctx.stream()))?;
    ctx.log("greeted");
    println!("{}", ctx.param::<u64>("number")?);
    Ok(())
}

#[crate::block]
fn fails() -> Result<(), std::num::ParseIntError> {
    "x".parse::<u8>().map(drop)
}

#[crate::block]
fn panics(message: String) {
    panic!("{message}");
}

#[crate::block]
fn asks_for_a_wrong_parameter(ctx: &mut BlockContext) -> BlockResult {
    ctx.param::<u64>("nmber")?;
    Ok(())
}

#[crate::block]
fn tells_its_environment() {
    let ours = std::env::vars()
        .filter(|(name, _)| name.starts_with("MILLSTREAM_ENTRY") || name.starts_with("MILLSTREAM_ARG_"));
    println!("{:?}", ours.collect::<Vec<_>>());
}

pub(crate) fn surroundings() -> Surroundings {
    Surroundings {
        stream: "server".parse().unwrap(),
        host: "here".to_owned(),
        architecture: std::env::consts::ARCH.to_owned(),
        python: Some("/usr/bin/python3".to_owned()),
        is_local: true,
        defaults: Defaults::default(),
        topology: Bytes::from_static(b"{}").into(),
    }
}

/// Runs phase `run` as a supervisor would, in as far as functions can tell.
fn run(block: &Block, directory: &Path) -> Output {
    let Compiled { spec, secret_files, uploads } = block.compile(&surroundings()).unwrap();
    assert!(uploads.is_empty());
    let phase = spec.phases.iter().find(|phase| phase.phase == millstream_common::spec::Phase::Run).unwrap();
    let mut command = Command::new("/bin/sh");
    let redirect = match phase.output {
        OutputDescriptors::Standard => "exec \"$@\"".to_owned(),
        OutputDescriptors::Moved { stdout, stderr } => {
            format!("exec \"$@\" {stdout}>&1 {stderr}>&2 >/dev/null 2>/dev/null")
        }
    };
    fs::create_dir(directory.join("work")).unwrap();
    let work = directory.join("work");
    command.args(["-c", &redirect, "sh"]).args(&phase.argv).stdin(Stdio::null()).current_dir(work);
    command.env("MILLSTREAM_TASK", "01939b5e-0000-7000-8000-000000000000");
    command.env("MILLSTREAM_STREAM", spec.stream.as_str());
    command.env("MILLSTREAM_OUTPUT", directory).env("MILLSTREAM_WHITEBOARD", directory.join("whiteboard"));
    command.envs(&spec.environment);
    for file in spec.files.iter().chain(&secret_files) {
        let place = if file.place == FilePlace::Work { "work" } else { "private" };
        let path = directory.join(place).join(&file.path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let FileSource::Inline(content) = &file.source else { panic!("{file:?}") };
        fs::write(&path, content).unwrap();
        if let Some(name) = &file.environment_name {
            command.env(name, if file.environment_holds_directory { path.parent().unwrap() } else { &path });
        }
    }
    command.output().unwrap()
}

fn check(block: &Block, code: i32, stdout: &str, stderr: &str) {
    let directory = tempfile::tempdir().unwrap();
    let output = run(block, directory.path());
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
    assert_eq!(out, stdout, "{err}");
    assert!(err.contains(stderr), "{err}");
}

#[test]
fn a_function_gets_its_arguments_and_prints_only_what_it_prints() {
    let greeting = || greet("world".to_owned(), 2, Some((0.5, vec!["a b".to_owned()]))).param("number", 7);
    let stdout = "hello world! Some((0.5, [\"a b\"]))\nhello world! Some((0.5, [\"a b\"]))\n7\n";
    check(&greeting(), 0, stdout, "greeted\n");
    check(&greeting().setup("true"), 0, stdout, "greeted\n");
    check(&greeting().wrap(["env", "-u", "HOME"]), 0, stdout, "greeted\n");
    assert_eq!(greeting().block_name().as_str(), "greet");
}

#[test]
fn an_error_is_printed_with_its_causes_and_fails_the_block() {
    check(&fails(), 1, "", "error: invalid digit found in string\n");
}

#[test]
fn a_panic_is_printed_with_its_place_and_fails_the_block() {
    check(&panics("no way".to_owned()), 101, "", "payload/tests.rs");
    check(&panics("no way".to_owned()), 101, "", "no way");
}

#[test]
fn a_parameter_that_is_not_there_names_the_nearest() {
    let block = asks_for_a_wrong_parameter().param("number", 7);
    check(&block, 1, "", "error: the block has no parameter `nmber`: did you mean `number`?\n");
}

#[test]
fn python_finds_its_module_and_its_tracebacks_name_the_file() {
    let greeting = crate::python("import millstream\nprint(millstream.param('number'))").param("number", 7);
    check(&greeting, 0, "7\n", "");
    check(&crate::python("\nraise ValueError('x')"), 1, "", "__block__.py\", line 2, in <module>");
}

#[test]
fn what_a_function_starts_does_not_take_itself_for_a_block() {
    check(&tells_its_environment(), 0, "[]\n", "");
}

#[test]
fn an_argument_that_is_no_json_is_refused_by_name() {
    let block = super::super::function::Call::new(&crate::__private::FUNCTIONS[0]);
    let map = std::collections::BTreeMap::from([((1, 2), 3)]);
    let error = block.argument("map", &map).into_block().compile(&surroundings()).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("argument `map` of `"), "{source}");
}

#[test]
fn a_host_with_another_machine_is_refused() {
    let elsewhere = Surroundings { is_local: false, architecture: "riscv64".to_owned(), ..surroundings() };
    let error = fails().compile(&elsewhere).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("host here is riscv64, this program is built for "), "{source}");
}

#[test]
fn another_host_gets_this_program_as_a_blob() {
    let elsewhere = Surroundings { is_local: false, ..surroundings() };
    let compiled = fails().compile(&elsewhere).unwrap();
    assert_eq!(compiled.uploads.len(), 1);
    assert!(compiled.spec.phases[0].argv[0].starts_with("./.millstream/millstream-"));
    let compiled = fails().cwd("/tmp").compile(&elsewhere).unwrap();
    assert_eq!(compiled.spec.phases[0].argv[2], "exec \"$MILLSTREAM_PROGRAM\" \"$@\"");
}
