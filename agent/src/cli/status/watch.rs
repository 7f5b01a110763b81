//! Agents over time: each change is shown as it is told, and an agent that goes away is looked for until it is back.

mod screen;

use std::time::Duration;

use millstream_common::limits;
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use self::screen::{Screen, Seen};
use super::{
    Answer, AskError, StatusError, answer_json,
    hosts::Target,
    print,
    shown::{as_table, row, rows},
};

/// Changes that wait to be shown: showing one takes no time.
const CHANGES_COUNT_MAX: usize = 16;
/// Shows changes until nobody reads them any more, or on a terminal until somebody interrupts.
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
    let mut screen = if on_terminal && !json { Some(Screen::begin()?) } else { None };
    loop {
        let change = match &mut screen {
            None => changes.recv().await.map(Some),
            Some(screen) => tokio::select! {
                change = changes.recv() => change.map(Some),
                seen = screen.seen() => match seen {
                    Seen::Resized => Some(None),
                    Seen::Ended => None,
                },
            },
        };
        let Some(change) = change else { return Ok(()) };
        let news = change.map(|(number, answer)| {
            let is_news = is_news(answers[number].as_ref(), &answer);
            answers[number] = Some(answer);
            (number, is_news)
        });
        let read = match (&mut screen, news) {
            (_, Some((_, false))) => true,
            (Some(screen), _) => screen.show(&all(&names, &answers))?,
            (None, Some((number, true))) => match &answers[number] {
                Some(answer) if json => print(&format!("{}\n", answer_json(&names[number], answer)))?,
                answer => print(&format!("{}\n", row(&names[number], answer.as_ref()).join("  ")))?,
            },
            (None, None) => true,
        };
        if !read {
            return Ok(());
        }
    }
}

/// An agent that cannot be asked is told once.
fn is_news(before: Option<&Answer>, now: &Answer) -> bool {
    match (before, now) {
        (Some(Err(before)), Err(now)) => before.to_string() != now.to_string(),
        _ => true,
    }
}

/// Everything that is known: one agent in full, many in a row each.
fn all(names: &[String], answers: &[Option<Answer>]) -> String {
    match answers {
        [Some(Ok(status))] => as_table(status),
        _ => rows(names.iter().map(String::as_str).zip(answers.iter().map(Option::as_ref))),
    }
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
