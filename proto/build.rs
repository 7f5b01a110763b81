//! Compiles the protocol with a pure-Rust compiler, so that no `protoc` needs to be installed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 5] = [
    "millstream/v1/agent.proto",
    "millstream/v1/authority.proto",
    "millstream/v1/sync.proto",
    "millstream/v1/nested.proto",
    "millstream/supervisor/v1/supervisor.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=millstream");
    let descriptors = protox::Compiler::new(["."])?
        .include_source_info(true)
        .include_imports(true)
        .open_files(FILES)?
        .file_descriptor_set();
    // Kept with its comments: reflection hands them to `grpcurl describe`.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("millstream.v1.descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
