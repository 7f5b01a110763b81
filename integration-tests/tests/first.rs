//! A first test of one's own, as README.md shows it word for word.
#![expect(clippy::print_stdout, reason = "output of a block is its log")]

use millstream::{BlockContext, BlockResult, Streams, shell};

millstream::entry!(); // lets this test binary be agent and payload

#[millstream::block] // a function of this file is a block; its arguments travel
fn server(ctx: &mut BlockContext, parties: usize) -> BlockResult {
    let listener = std::net::TcpListener::bind("0.0.0.0:0")?;
    ctx.publish("port", listener.local_addr()?.port())?;
    ctx.barrier("listening", parties)?; // held here until the client is there too
    let (connection, _) = listener.accept()?;
    println!("{}", std::io::read_to_string(connection)?);
    Ok(())
}

const CLIENT: &str = r#"
    millstream-sync barrier listening 2
    port=$(millstream-sync get port)
    exec bash -c "printf hello >/dev/tcp/$SERVER/$port"
"#;

#[tokio::test]
async fn the_server_hears_the_client() -> millstream::Result<()> {
    let streams = Streams::builder("greeting").results_dir(env!("CARGO_TARGET_TMPDIR")).open()?;
    let server_stream = streams.get("server")?; // not defined anywhere: this machine
    let serving = server_stream.run_bg(server(2)); // returns at once
    streams.get("client")?.run_fg(shell(CLIENT).env("SERVER", server_stream.host())).await?;
    assert_eq!(serving.wait().await?.stdout(), "hello\n");
    streams.close().await
}
