//! All orders in which actors can be given turns, depth first, up to a number of preemptions and deaths.
//!
//! A run begins anew each time and follows the choices of the one before up to the last that had another option. What
//! actors do depends on what they have seen alone, so a state that was reached before, with as many turns
//! taken away, is not gone through again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::promises::{Journal, Promises};
use super::store::{Door, Grant, Memory, Told, Wait};

/// What an actor does with its door.
pub type Act = Arc<dyn Fn(&Arc<Door>, &Mutex<Journal>) + Send + Sync>;

/// Actors, and what is there when they begin.
pub struct Scene {
    pub name: &'static str,
    pub memory: Memory,
    pub actors: Vec<Act>,
    pub preemptions_max: u32,
    pub deaths_max: u32,
}

/// What a search came to.
#[derive(Debug)]
pub struct Found {
    /// Orders that were gone through.
    pub schedules: u64,
    /// The first broken promise, with the order of turns.
    pub broken: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Turn(usize),
    Death(usize),
}

struct Choice {
    options: Vec<Action>,
    taken: usize,
}

/// Where an actor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Place {
    Turn(u64),
    Readers(u64),
    Ended,
}

/// What a run depends on from here on: the store, what actors were told, where they are, and which turns were taken away.
type State = ((u64, u64), Vec<Place>, usize, u32, u32);

/// Goes through all orders until a promise is broken.
pub fn search(scene: &Scene) -> Found {
    let mut choices: Vec<Choice> = Vec::new();
    let mut visited = HashSet::new();
    let mut schedules = 0;
    loop {
        schedules += 1;
        let broken = Run::new(scene).go(&mut choices, &mut visited);
        if broken.is_some() {
            return Found { schedules, broken };
        }
        while let Some(choice) = choices.last_mut() {
            choice.taken += 1;
            if choice.taken < choice.options.len() {
                break;
            }
            choices.pop();
        }
        if choices.is_empty() {
            return Found {
                schedules,
                broken: None,
            };
        }
    }
}

struct Run<'a> {
    scene: &'a Scene,
    memory: Memory,
    journal: Arc<Mutex<Journal>>,
    told: Receiver<(usize, Told)>,
    grants: Vec<Sender<Grant>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    places: Vec<Place>,
    current: usize,
    preemptions: u32,
    deaths: u32,
    turns: Vec<Action>,
}

impl<'a> Run<'a> {
    fn new(scene: &'a Scene) -> Self {
        let (tell, told) = unbounded();
        let memory = scene.memory.fork();
        let journal = Arc::new(Mutex::new(Journal::default()));
        let mut run = Self {
            scene,
            memory: memory.clone(),
            journal: Arc::clone(&journal),
            told,
            grants: Vec::new(),
            threads: Vec::new(),
            places: vec![Place::Ended; scene.actors.len()],
            current: 0,
            preemptions: 0,
            deaths: 0,
            turns: Vec::new(),
        };
        for (actor, act) in scene.actors.iter().enumerate() {
            let (grant, grants) = bounded(1);
            run.grants.push(grant);
            let door = Door::new(memory.clone(), actor, tell.clone(), grants);
            let (act, journal, tell) = (Arc::clone(act), Arc::clone(&journal), tell.clone());
            let body = move || {
                act(&Arc::new(door), &journal);
                tell.send((actor, Told::Ended)).unwrap();
            };
            run.threads.push(std::thread::spawn(body));
            run.listen(actor);
        }
        run
    }

    /// Waits until the actor that goes on waits again or has ended.
    fn listen(&mut self, actor: usize) {
        let (from, told) = self.told.recv().unwrap();
        assert_eq!(from, actor, "only one goes on at a time");
        self.places[actor] = match told {
            Told::Waits(Wait::Turn, seen) => Place::Turn(seen),
            Told::Waits(Wait::Readers, seen) => Place::Readers(seen),
            Told::Ended => Place::Ended,
        };
    }

    fn may_go(&self, actor: usize) -> bool {
        match self.places[actor] {
            Place::Turn(_) => true,
            Place::Readers(_) => !self.journal.lock().unwrap().is_read(),
            Place::Ended => false,
        }
    }

    fn options(&self) -> Vec<Action> {
        let mut options = Vec::new();
        let goes_on = self.may_go(self.current);
        if goes_on {
            options.push(Action::Turn(self.current));
        }
        if !goes_on || self.preemptions < self.scene.preemptions_max {
            let others = (0..self.places.len()).filter(|actor| *actor != self.current);
            options.extend(others.filter(|actor| self.may_go(*actor)).map(Action::Turn));
        }
        if goes_on && self.deaths < self.scene.deaths_max {
            options.push(Action::Death(self.current));
        }
        options
    }

    fn carry_out(&mut self, action: Action) {
        self.turns.push(action);
        let (actor, grant) = match action {
            Action::Turn(actor) => (actor, Grant::Turn),
            Action::Death(actor) => (actor, Grant::Death),
        };
        if actor != self.current && self.may_go(self.current) {
            self.preemptions += 1;
        }
        self.current = actor;
        self.grants[actor].send(grant).unwrap();
        self.listen(actor);
        if grant == Grant::Death {
            self.deaths += 1;
            self.journal.lock().unwrap().died(actor);
        }
    }

    fn go(mut self, choices: &mut Vec<Choice>, visited: &mut HashSet<State>) -> Option<String> {
        let promises = Promises::new(self.memory.clone());
        let known = choices.len();
        let mut depth = 0;
        let mut broken = None;
        loop {
            if depth == choices.len() {
                let options = self.options();
                if options.is_empty() {
                    break;
                }
                choices.push(Choice { options, taken: 0 });
            }
            let action = choices[depth].options[choices[depth].taken];
            depth += 1;
            let changes = self.memory.changes();
            self.carry_out(action);
            let mut journal = self.journal.lock().unwrap();
            let told = journal.is_new();
            let changed = self.memory.changes() != changes || told;
            if depth < known {
                continue;
            }
            let state = (
                (self.memory.hash(), journal.hash()),
                self.places.clone(),
                self.current,
                self.preemptions,
                self.deaths,
            );
            if !visited.insert(state) {
                break;
            }
            broken = changed.then(|| promises.check(&journal, told)).flatten();
            if broken.is_some() {
                break;
            }
        }
        let name = self.scene.name;
        let turns = self.end();
        broken.map(|what| format!("{name}: {what}; turns: {turns:?}"))
    }

    /// Ends all actors.
    fn end(mut self) -> Vec<Action> {
        for actor in 0..self.places.len() {
            if self.places[actor] != Place::Ended {
                self.grants[actor].send(Grant::Death).unwrap();
                self.listen(actor);
            }
        }
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        self.turns
    }
}
