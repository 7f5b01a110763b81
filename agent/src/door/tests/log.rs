//! The end of a task's log, as operators read it.

use super::*;

impl Agent {
    /// A reader with a certificate of this role.
    async fn reader(&self, role: Role) -> AgentServiceClient<Channel> {
        self.client(Caller::Certified(Identity::new(role, "olga").unwrap())).await
    }
}

/// Texts of the lines, until there are no more.
async fn texts(lines: &mut tonic::Streaming<v1::ReadLogResponse>) -> Vec<String> {
    let mut texts = Vec::new();
    while let Some(message) = timeout(PATIENCE, lines.message()).await.unwrap().unwrap() {
        texts.extend(message.lines.into_iter().map(|line| line.text));
    }
    texts
}

fn request(task_id: &str, lines_count: u32, follow: bool) -> v1::ReadLogRequest {
    v1::ReadLogRequest { task_id: task_id.to_owned(), lines_count, follow }
}

#[tokio::test]
async fn an_operator_reads_the_last_lines_and_follows_to_the_end() {
    let state = tempfile::tempdir().unwrap();
    let fifo = state.path().join("go");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let script =
        format!("seq 1 200000; echo ready; read line < '{}'; echo $line; printf end", fifo.display());
    let task = controller.start(spec(1, &script)).await;
    let mut olga = agent.reader(Role::Operator).await;
    let mut lines = olga.read_log(request(&task, 3, true)).await.unwrap().into_inner();
    // Where it begins depends on how far the block is; from there on no line is missing.
    let mut seen: Vec<String> = Vec::new();
    while seen.last().is_none_or(|line| line != "ready") {
        let message = timeout(PATIENCE, lines.message()).await.unwrap().unwrap().unwrap();
        seen.extend(message.lines.into_iter().map(|line| line.text));
    }
    let numbers: Vec<u32> = seen.iter().filter_map(|line| line.parse().ok()).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{} lines", numbers.len());
    let now = texts(&mut olga.read_log(request(&task, 3, false)).await.unwrap().into_inner()).await;
    assert_eq!(now, ["199999", "200000", "ready"]);
    let most = texts(&mut olga.read_log(request(&task, 1_000, false)).await.unwrap().into_inner()).await;
    assert_eq!((most.len(), most[0].as_str()), (1_000, "199002"));
    let path = fifo.clone();
    tokio::task::spawn_blocking(move || std::fs::write(path, "go on\n")).await.unwrap().unwrap();
    assert_eq!(texts(&mut lines).await, ["go on", "end"]);
    controller.close().await;
    agent.end().await;
}

#[tokio::test]
async fn a_log_is_read_by_who_is_known_and_of_tasks_that_are_known() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let task = controller.start(spec(1, "true")).await;
    controller.ends(&task, 1).await;
    // A mark is all that there is.
    let mut bob = agent.reader(Role::Controller).await;
    assert_eq!(
        texts(&mut bob.read_log(request(&task, 0, true)).await.unwrap().into_inner()).await,
        ["run begins"]
    );
    let mut refused = Vec::new();
    for caller in [Caller::Loopback, Caller::Local { uid: 4_294_967_294 }] {
        refused.push(agent.client(caller).await.read_log(request(&task, 0, false)).await.unwrap_err().code());
    }
    let unknown = SystemIds.task_id().to_string();
    for wrong in [request("x", 0, false), request(&task, 1_001, false), request(&unknown, 0, false)] {
        refused.push(bob.read_log(wrong).await.unwrap_err().code());
    }
    let (denied, invalid) = (Code::PermissionDenied, Code::InvalidArgument);
    assert_eq!(refused, [denied, denied, invalid, invalid, Code::NotFound]);
    controller.close().await;
    agent.end().await;
}

#[tokio::test]
async fn following_ends_with_the_session() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let task = controller.start(spec(1, "echo up; sleep 1000")).await;
    let mut olga = agent.reader(Role::Operator).await;
    let mut lines = olga.read_log(request(&task, 0, true)).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while seen.last().is_none_or(|line| line != "up") {
        let message = timeout(PATIENCE, lines.message()).await.unwrap().unwrap().unwrap();
        seen.extend(message.lines.into_iter().map(|line| line.text));
    }
    controller.close().await;
    // Either there is nothing more, or nothing is known of the task any more.
    while let Ok(Some(_)) = timeout(PATIENCE, lines.message()).await.unwrap() {}
    agent.end().await;
}
