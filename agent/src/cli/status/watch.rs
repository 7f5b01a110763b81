//! Agents over time: each change is shown as it is told, and an agent that goes away is looked for until it is back.

use std::time::Duration;

use millstream_common::limits;
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::{
    Answer, AskError, StatusError, answer_json,
    hosts::Target,
    print,
    shown::{as_table, row, rows},
};

/// Changes that wait to be shown: showing one takes no time.
const CHANGES_COUNT_MAX: usize = 16;
/// Goes to the upper left corner and clears what is below.
const REDRAW: &str = "\x1b[H\x1b[2J";

/// Shows changes until nobody reads them any more.
pub(super) async fn run(
    targets: Vec<Target>,
    patience: Duration,
    json: bool,
    on_terminal: bool,
) -> Result<(), StatusError> {
    let names: Vec<String> = targets.iter().map(|target| target.name.clone()).collect();
    let (told, mut changes) = mpsc::channel(CHANGES_COUNT_MAX);
    for (number, target) in targets.into_iter().enumerate() {
        tokio::spawn(follow(number, target, patience, told.clone()));
    }
    drop(told);
    let mut answers: Vec<Option<Answer>> = names.iter().map(|_| None).collect();
    while let Some((number, answer)) = changes.recv().await {
        let is_old_news = match (&answers[number], &answer) {
            (Some(Err(before)), Err(now)) => before.to_string() == now.to_string(),
            _ => false,
        };
        if is_old_news {
            continue;
        }
        let answer = answers[number].insert(answer);
        let text = if json {
            format!("{}\n", answer_json(&names[number], answer))
        } else if !on_terminal {
            format!("{}\n", row(&names[number], Some(answer)).join("  "))
        } else if let [Some(Ok(status))] = answers.as_slice() {
            format!("{REDRAW}{}", as_table(status))
        } else {
            let all = names.iter().map(String::as_str).zip(answers.iter().map(Option::as_ref));
            format!("{REDRAW}{}", rows(all))
        };
        if !print(&text)? {
            break;
        }
    }
    Ok(())
}

/// Tells every change of one agent, and when it cannot be asked.
async fn follow(number: usize, target: Target, patience: Duration, told: mpsc::Sender<(usize, Answer)>) {
    let mut pause = limits::RECONNECT_PAUSE_MIN;
    loop {
        let mut seen = false;
        let Err(error) = follow_once(number, &target, patience, &told, &mut seen).await else { return };
        if told.send((number, Err(error))).await.is_err() {
            return;
        }
        pause = if seen { limits::RECONNECT_PAUSE_MIN } else { (pause * 2).min(limits::RECONNECT_PAUSE_MAX) };
        sleep(pause).await;
    }
}

async fn follow_once(
    number: usize,
    target: &Target,
    patience: Duration,
    told: &mpsc::Sender<(usize, Answer)>,
    seen: &mut bool,
) -> Result<(), AskError> {
    let watching = async {
        let mut client = AgentServiceClient::new(target.connect().await?);
        Ok::<_, AskError>(client.watch_status(v1::WatchStatusRequest {}).await?.into_inner())
    };
    let mut watched = timeout(patience, watching).await.map_err(|_| AskError::Silent { patience })??;
    while let Some(message) = watched.message().await? {
        *seen = true;
        if told.send((number, Ok(message.status.unwrap_or_default()))).await.is_err() {
            return Ok(());
        }
    }
    Err(AskError::Ended)
}
