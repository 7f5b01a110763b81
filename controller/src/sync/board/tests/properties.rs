//! What must hold whatever happens: nobody waits for the dead, and nothing is given up that could be met.

use proptest::prelude::*;

use super::*;

/// Three streams of two tasks each, three barriers, one topic.
fn any_step() -> impl Strategy<Value = Step> {
    let task = prop::sample::select(vec!["a/1", "a/2", "b/1", "b/2", "c/1", "c/2"]);
    let barrier = prop::sample::select(vec!["x", "y", "z"]);
    prop_oneof![
        10 => (task.clone(), barrier.clone()).prop_map(|(task, barrier)| {
            let parties = if barrier == "z" { 3 } else { 2 };
            enter(task, barrier, parties)
        }),
        3 => task.clone().prop_map(|task| waits_for(task, "t", 3)),
        3 => (task.clone(), 0_u64..3).prop_map(|(task, from)| listens(task, "t", from)),
        3 => (task.clone(), 0_u64..3).prop_map(|(task, from)| waits_next(task, "u", from)),
        2 => task.clone().prop_map(|task| publish(task, "t")),
        1 => task.clone().prop_map(|task| publish(task, "u")),
        3 => task.clone().prop_map(passes),
        2 => task.clone().prop_map(fails),
        1 => Just(main_waits()),
        1 => Just(Step::Main(false)),
        1 => (task, any::<bool>()).prop_map(|(task, link)| Step::Leave(task.into(), link)),
        1 => barrier.clone().prop_map(|barrier| Step::Reset("main".into(), barrier.into())),
        1 => (barrier, any::<bool>()).prop_map(|(b, release)| Step::Hold("person".into(), b.into(), release)),
        1 => (0_u64..300).prop_map(after),
    ]
}

/// An open wait.
struct ModelWait {
    need: usize,
    held: bool,
    inside: Vec<String>,
    /// It holds nobody.
    listens: bool,
}

/// What a plain reading of the rules says of the open waits, from nothing but what the script did.
#[derive(Default)]
struct Model {
    /// Unfinished tasks, by stream in order.
    lines: BTreeMap<String, Vec<String>>,
    main_waits: usize,
    unexpected: bool,
}

impl Model {
    /// Waits of the board that cannot end well: every one that is not reached from tasks that can act.
    fn stuck(&self, board: &Board) -> usize {
        if self.main_waits == 0 && !self.unexpected {
            return 0;
        }
        let mut waits: Vec<ModelWait> = Vec::new();
        let unfinished: Vec<&String> = self.lines.values().flatten().collect();
        let inside = |wanted: &dyn Fn(&Place) -> bool| {
            let holds = |name: &&&String| {
                board.tasks[&id(name)].calls.iter().any(|call| board.calls.get(call).is_some_and(wanted))
            };
            unfinished.iter().filter(holds).map(|name| (**name).clone()).collect::<Vec<_>>()
        };
        for (index, slot) in board.barriers.values().enumerate() {
            if let Some(meeting) = slot.barrier.meeting() {
                let need = meeting.parties as usize - meeting.arrivals.len();
                let inside = inside(&|place| matches!(place.wait, Wait::Barrier(at) if at == index));
                waits.push(ModelWait { need, held: slot.barrier.is_held(), inside, listens: false });
            }
        }
        let calls: BTreeMap<&CallId, &Place> = board.calls.iter().collect();
        for (call, place) in calls {
            if let Wait::Topic(number) = place.wait {
                let listens = board.topics.awaited(*call).unwrap().wanted.listens();
                let inside = inside(&|other| matches!(other.wait, Wait::Topic(at) if at == number));
                waits.push(ModelWait { need: 1, held: false, inside, listens });
            }
        }
        let mut open: Vec<usize> = (0..waits.len()).collect();
        loop {
            let able = |open: &[usize], but: Option<&str>| -> usize {
                let held = |task: &String| {
                    open.iter().any(|&wait| !waits[wait].listens && waits[wait].inside.contains(task))
                };
                let lines = self.lines.iter().filter(|(stream, _)| Some(stream.as_str()) != but);
                lines.map(|(_, line)| line.iter().take_while(|task| !held(task)).count()).sum()
            };
            let before = open.len();
            let now = open.clone();
            // Whoever is inside a wait that is open is not counted as able, so nobody is counted twice. Nobody is told
            // anything by its own stream.
            open.retain(|&wait| {
                let ModelWait { need, held, inside, listens } = &waits[wait];
                let own = inside.first().filter(|_| *listens).map(|task| &task[..1]);
                !held && able(&now, own) < *need
            });
            if open.len() == before {
                return open.len();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nobody_waits_for_the_dead(steps in prop::collection::vec(any_step(), 0..60)) {
        let mut script = board();
        let mut model = Model::default();
        for name in ["a/1", "a/2", "b/1", "b/2", "c/1", "c/2"] {
            script.step(&Step::Scheduled(name.into(), None, None));
            model.lines.entry(name[..1].to_owned()).or_default().push(name.to_owned());
        }
        for step in &steps {
            let by_task = match step {
                Step::Enter(who, ..)
                | Step::Await(who, ..)
                | Step::Listen(who, ..)
                | Step::Next(who, ..)
                | Step::Publish(who, ..) => Some(who),
                Step::Ended(who, ..) => {
                    // A host tells ends in order.
                    if model.lines[&who[..1]].first() != Some(who) {
                        continue;
                    }
                    None
                }
                _ => None,
            };
            if let Some(who) = by_task {
                // A block that waits says nothing else, unless it only listens, and only the first task of a stream
                // runs.
                let first = model.lines[&who[..1]].first() == Some(who);
                let listens = |call: &CallId| {
                    let wait = script.board.topics.awaited(*call);
                    wait.is_some_and(|wait| wait.wanted.listens())
                };
                if !first || !script.board.tasks[&id(who)].calls.iter().all(listens) {
                    continue;
                }
            }
            match step {
                Step::Ended(who, unexpected, _) => {
                    model.lines.get_mut(&who[..1]).unwrap().remove(0);
                    model.unexpected |= unexpected;
                }
                Step::Main(true) => model.main_waits += 1,
                Step::Main(false) => model.main_waits = model.main_waits.saturating_sub(1),
                _ => {}
            }
            script.step(step);
            prop_assert_eq!(model.stuck(&script.board), 0, "after {:?}: {:#?}", step, script.told);
        }
    }

    /// Tasks that answer one another take turns as long as one of them can speak, and are all told when nobody can.
    #[test]
    fn those_who_only_answer_each_other_are_told_when_nobody_speaks(
        topics in prop::collection::vec(0..5_usize, 2..6),
        turns in 0..12_u64,
    ) {
        let mut script = board();
        let names: Vec<String> = (0..topics.len()).map(|task| format!("s{task}/1")).collect();
        for name in &names {
            script.step(&Step::Scheduled(name.clone(), None, None));
        }
        // A value for everybody to begin with; each answers what it hears, for some turns.
        let speaker = "starter/1";
        script.step(&Step::Scheduled(speaker.into(), None, None));
        script.step(&main_waits());
        let (mut seen, mut counts, mut left) = (vec![0; names.len()], vec![0; 5], turns);
        for (name, topic) in names.iter().zip(&topics) {
            script.step(&waits_next(name, &topic.to_string(), 0));
        }
        for (topic, count) in counts.iter_mut().enumerate() {
            script.step(&publish(speaker, &topic.to_string()));
            *count += 1;
        }
        script.step(&passes(speaker));
        while let Some(task) = (0..names.len()).find(|&task| seen[task] < counts[topics[task]]) {
            prop_assert!(!script.told.iter().any(|told| told.contains("given up")), "{:#?}", script.told);
            seen[task] = counts[topics[task]];
            if left > 0 {
                left -= 1;
                let answer = topics[(task + 1) % topics.len()];
                script.step(&publish(&names[task], &answer.to_string()));
                counts[answer] += 1;
            }
            script.step(&waits_next(&names[task], &topics[task].to_string(), seen[task]));
        }
        // Those of one circle first; once they have failed, nobody is left for the others.
        let mut unfinished = names.clone();
        while !unfinished.is_empty() {
            let open: Vec<String> = script.open.values().cloned().collect();
            let (waiting, told): (Vec<_>, Vec<_>) = unfinished.into_iter().partition(|name| open.contains(name));
            prop_assert!(!told.is_empty(), "{:?} wait in {:#?}", waiting, script.told);
            told.iter().for_each(|name| script.step(&fails(name)));
            unfinished = waiting;
        }
        let told = script.told.iter().filter(|told| told.contains("given up")).count();
        prop_assert_eq!(told, names.len(), "{:#?}", script.told);
    }

    /// The count never gives up what could still have ended well: with enough tasks, everything is met.
    #[test]
    fn nothing_is_given_up_that_could_be_met(order in Just(vec![0, 1, 2, 3, 4, 5]).prop_shuffle()) {
        let mut script = board();
        let names = ["a/1", "b/1", "c/1", "d/1", "e/1", "f/1"];
        for name in names {
            script.step(&Step::Scheduled(name.into(), None, None));
        }
        script.step(&main_waits());
        for round in 0..3 {
            for &number in &order {
                // Pairs first, then all six, then triples.
                let (barrier, parties) = match round {
                    0 => (format!("pair {}", number / 2), 2),
                    1 => ("all".to_owned(), 6),
                    _ => (format!("triple {}", number % 2), 3),
                };
                script.step(&enter(names[number], &barrier, parties));
            }
            prop_assert!(script.open.is_empty(), "{:?}", script.told);
        }
        prop_assert!(script.told.iter().all(|told| told.contains("released")), "{:#?}", script.told);
    }
}

#[test]
fn ten_thousand_parties_with_main_waiting_meet_without_searching_for_each() {
    let mut board = Board::default();
    #[expect(clippy::disallowed_methods, reason = "any instant will do; it never runs")]
    let now = Instant::now();
    let mut actions = Vec::new();
    let task = |number: u32| TaskId::from_uuid(Uuid::from_u128(u128::from(number) + 1));
    for number in 0..10_000 {
        let label = SpeakerLabel {
            stream: StreamName::new(format!("s{number}")).unwrap(),
            number: 1,
            block: BlockName::new("block").unwrap(),
        };
        let event = Event::TaskScheduled { task: task(number), label, joins: None, group_size: None };
        board.handle(event, now, &mut actions);
    }
    board.handle(Event::MainWaited { waiting: true }, now, &mut actions);
    for number in 0..10_000 {
        let request = Request::Enter {
            barrier: barrier_name("all"),
            parties: 10_000.into(),
            timeout: Duration::from_secs(60),
            token: Some(number.to_string().into()),
            payload: Bytes::new(),
            display_name: None,
        };
        let speaker = Speaker::Task(task(number));
        board.handle(Event::Asked { call: CallId(number.into()), speaker, request }, now, &mut actions);
    }
    let released = actions
        .iter()
        .filter(|a| matches!(a, Action::Answer { answer: Answer::Released { .. }, .. }))
        .count();
    assert_eq!(released, 10_000);
    board.assert_invariants();
}
