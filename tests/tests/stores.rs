//! Every store: one list of cases for all, and the whole job of the two programs on each, also where the store
//! fails as stores do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use shipper::error::ErrorKind;
use shipper::store::cloud::Environment;
use shipper::store::counted::Requests;
use shipper::store::{Created, Store, VaultUrl};
use tests::emulators::{Emulator, Protocol, SIGNATURE};
use tests::faulty_store::{FAULTS, FaultyStore};
use tests::process::run;
use tests::seed::Random;
use tests::site::{Site, await_status, number, status};

const MIB: u64 = 1 << 20;

/// Objects of the long listing: more than the thousand that S3 gives at once.
const OBJECTS: usize = 1050;
const THREADS: usize = 8;

fn open(url: &str, environment: &[(String, String)]) -> Box<dyn Store> {
    let environment: Environment = environment.iter().cloned().collect();
    let url = VaultUrl::parse(url).unwrap();
    match url.prepare_in(&environment) {
        Ok(store) => Box::new(store),
        Err(error) => panic!("{}", error.chain()),
    }
}

fn text(content: &str) -> Bytes {
    Bytes::from(content.to_owned())
}

/// The cases that every store must pass. `base` ends with a name of its own for each run.
fn every_case(base: &str, environment: &[(String, String)]) {
    let store = open(&format!("{base}/vault"), environment);
    let store = &*store;
    assert_eq!(store.list("probe").unwrap(), [], "the trial left something");
    creates_and_replaces(store);
    reads(store);
    removes(store);
    lists(store);
    races(store);
    holds_large_objects(store);
    let neighbour = open(&format!("{base}/vault2"), environment);
    assert_eq!(neighbour.size("a/b").unwrap(), None, "prefixes are apart");
    assert_eq!(neighbour.list("a").unwrap(), []);
    let root = open(base, environment);
    assert_eq!(root.size("vault/a/b").unwrap(), Some(5));
    for object in root.list("vault").unwrap() {
        assert!(root.delete(&object.key).unwrap(), "{}", object.key);
    }
    assert_eq!(root.list("").unwrap(), []);
}

fn creates_and_replaces(store: &dyn Store) {
    assert_eq!(store.create("a/b", text("first")).unwrap(), Created::New);
    for other in ["other", "first", ""] {
        assert_eq!(store.create("a/b", text(other)).unwrap(), Created::Exists);
        assert_eq!(store.read("a/b", None).unwrap(), "first");
    }
    store.replace("a/new", text("one")).unwrap();
    store.replace("a/new", text("longer")).unwrap();
    assert_eq!(store.read("a/new", None).unwrap(), "longer");
    assert_eq!(store.create("a/new", text("x")).unwrap(), Created::Exists);
    assert_eq!(store.create("a/empty", text("")).unwrap(), Created::New);
    assert_eq!(store.read("a/empty", None).unwrap(), "");
    assert_eq!(store.size("a/empty").unwrap(), Some(0));
}

fn reads(store: &dyn Store) {
    let kind = |key: &str, range| store.read(key, range).unwrap_err().kind();
    store.replace("a/digits", text("0123456789")).unwrap();
    for (range, expected) in [
        (0..10, "0123456789"),
        (0..1, "0"),
        (2..5, "234"),
        (9..10, "9"),
    ] {
        assert_eq!(store.read("a/digits", Some(range)).unwrap(), expected);
    }
    for range in [5..11, 9..4096, 10..11, 100..200] {
        assert_eq!(
            kind("a/digits", Some(range.clone())),
            ErrorKind::Corrupt,
            "{range:?}"
        );
    }
    assert_eq!(store.size("a/digits").unwrap(), Some(10));
    assert_eq!(store.size("a/none").unwrap(), None);
    assert_eq!(kind("a/none", None), ErrorKind::Missing);
    assert_eq!(kind("a/none", Some(0..1)), ErrorKind::Missing);
}

fn removes(store: &dyn Store) {
    store.create("c/d", text("x")).unwrap();
    assert!(store.delete("c/d").unwrap());
    assert!(!store.delete("c/d").unwrap(), "there is none any more");
    assert!(!store.delete("c/never").unwrap());
    assert_eq!(store.size("c/d").unwrap(), None);
    assert_eq!(store.create("c/d", text("y")).unwrap(), Created::New);
    assert_eq!(store.read("c/d", None).unwrap(), "y");
}

fn lists(store: &dyn Store) {
    let key = |number: usize| format!("many/below/{number:05}");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for number in (thread..OBJECTS).step_by(THREADS) {
                    let content = text(&"x".repeat(number % 10));
                    assert_eq!(store.create(&key(number), content).unwrap(), Created::New);
                }
            });
        }
    });
    store.create("many/below2/no", text("")).unwrap();
    let listed = store.list("many/below").unwrap();
    assert_eq!(listed.len(), OBJECTS);
    for (number, object) in listed.iter().enumerate() {
        assert_eq!(
            object.key,
            key(number),
            "in order, and relative to the vault"
        );
        assert_eq!(object.size_bytes, (number % 10) as u64);
    }
    assert_eq!(store.list("many").unwrap().len(), OBJECTS + 1);
    assert_eq!(store.list("nothing/here").unwrap(), []);
}

/// Of many who create one object, one does.
fn races(store: &dyn Store) {
    for round in 0..20 {
        let key = &format!("race/{round}");
        let (start, winners) = (&Barrier::new(THREADS), &AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    let content = text(&format!("by {thread}"));
                    start.wait();
                    if store.create(key, content.clone()).unwrap() == Created::New {
                        winners.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(store.read(key, None).unwrap(), content);
                    }
                });
            }
        });
        assert_eq!(winners.load(Ordering::SeqCst), 1, "round {round}");
    }
}

fn holds_large_objects(store: &dyn Store) {
    let content = Bytes::from(Random::new(7).bytes(33 << 20));
    assert_eq!(
        store.create("large", content.clone()).unwrap(),
        Created::New
    );
    assert_eq!(store.create("large", text("x")).unwrap(), Created::Exists);
    assert_eq!(store.size("large").unwrap(), Some(content.len() as u64));
    assert!(store.read("large", None).unwrap() == content);
    let range = 12_345_678..12_345_678 + 100_000;
    let expected = content.slice(range.start as usize..range.end as usize);
    assert!(store.read("large", Some(range)).unwrap() == expected);
}

/// The whole job: a first copy, a few recovery points, each restored and compared, everything verified. No listing
/// on the way from a cut to the vault.
fn whole_job(
    mut site: Site,
    url: String,
    environment: Vec<(String, String)>,
    storm: &dyn Fn(bool),
) {
    site.vault_elsewhere = Some(url);
    site.environment = environment;
    let mut random = Random::from_environment("whole_job");
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    client.write(0, &random.bytes(6 << 20)).unwrap();
    site.protect();
    storm(true);
    let shipper = site.start_shipper();
    let mut expected = vec![(site.cut(), site.path("first"))];
    fs::copy(site.image("disk"), site.path("first")).unwrap();
    let lists = || number(&status(&site).unwrap(), "/vault_requests/list/requests");
    let before = lists();
    for round in 0..4 {
        for _ in 0..20 {
            let offset = random.below(8 << 8) << 12;
            client.write(offset, &random.bytes(4096)).unwrap();
        }
        client.trim(random.below(8) * MIB, 64 << 10).unwrap();
        let copy = site.path(&format!("copy-{round}"));
        expected.push((site.cut(), copy.clone()));
        fs::copy(site.image("disk"), copy).unwrap();
    }
    assert_eq!(lists(), before, "capture, upload and commit list nothing");
    await_status(&site, "no trouble left", |status| status["health"] == "ok");
    let text = site.shipper(&["status"]).success();
    assert!(text.contains("requests to the vault: "), "{text}");
    assert_eq!(site.points().len(), expected.len());
    for (point, copy) in &expected {
        site.check_restore(point, copy);
    }
    site.shipper(&["verify", "--data"]).success();
    storm(false);
    shipper.stop();
    tracker.stop();
}

fn job_site() -> Site {
    Site::new(&[("disk", 8 * MIB)])
}

#[test]
fn a_folder() {
    let site = job_site();
    let base = format!("file://{}/store", site.root().display());
    every_case(&base, &[]);
    let url = site.vault_url();
    whole_job(site, url, Vec::new(), &|_| {});
}

fn emulated(protocol: Protocol) {
    let Some(emulator) = Emulator::start(protocol) else {
        return;
    };
    let environment = emulator.environment(&emulator.address);
    every_case(&emulator.url("cases"), &environment);
    whole_job(job_site(), emulator.url("job"), environment, &|_| {});
}

#[test]
fn s3_by_moto() {
    emulated(Protocol::S3);
}

#[test]
fn azure_by_azurite() {
    emulated(Protocol::Azure);
}

/// Any store that the environment reaches: `TIDEMARK_TEST_STORE=gs://BUCKET/PREFIX`. Left out without it.
#[test]
fn a_store_of_choice() {
    let Ok(base) = std::env::var("TIDEMARK_TEST_STORE") else {
        println!("LEFT OUT: no TIDEMARK_TEST_STORE");
        return;
    };
    let site = job_site();
    let name = site.root().file_name().unwrap().to_str().unwrap();
    let unique = format!("{}/{name}", base.trim_end_matches('/'));
    let environment: Vec<(String, String)> = std::env::vars().collect();
    every_case(&format!("{unique}/cases"), &environment);
    whole_job(site, format!("{unique}/job"), Vec::new(), &|_| {});
}

fn storm(protocol: Protocol) {
    let Some(emulator) = Emulator::start(protocol) else {
        return;
    };
    let proxy = FaultyStore::start(&emulator.address, Random::from_environment("storm"));
    let environment = emulator.environment(&proxy.address);
    whole_job(job_site(), emulator.url("storm"), environment, &|on| {
        proxy.set_faulty(on);
    });
    let seen = proxy.seen();
    println!("{seen:?}");
    let kinds = FAULTS
        .iter()
        .filter(|fault| seen.faults.contains_key(fault));
    // A few of the rarer ones may not have come up: creates are not many.
    assert!(kinds.count() >= FAULTS.len() - 2, "{seen:?}");
}

#[test]
fn s3_in_a_storm() {
    storm(Protocol::S3);
}

#[test]
fn azure_in_a_storm() {
    storm(Protocol::Azure);
}

/// Creates through a proxy that carries them out and hides it: each is ours, or not, but never both.
#[test]
fn a_create_that_was_not_answered_is_known_again() {
    let Some(emulator) = Emulator::start(Protocol::S3) else {
        return;
    };
    let proxy = FaultyStore::start(&emulator.address, Random::from_environment("creates"));
    let faulty = open(
        &emulator.url("creates"),
        &emulator.environment(&proxy.address),
    );
    let sound = open(
        &emulator.url("creates"),
        &emulator.environment(&emulator.address),
    );
    proxy.set_faulty(true);
    let mut random = Random::from_environment("contents");
    let mut counts = [0; 2];
    for number in 0..200 {
        let key = format!("k/{number}");
        let ours = Bytes::from(random.bytes(64));
        let taken = random.chance(1, 4);
        if taken {
            // As long as ours, so that the size alone does not tell.
            sound.create(&key, Bytes::from(random.bytes(64))).unwrap();
        }
        let created = faulty.create(&key, ours.clone()).unwrap();
        let found = sound.read(&key, None).unwrap();
        match created {
            Created::New => assert_eq!(found, ours),
            // The proxy may say 412 to what it has just carried out; then it is for the caller to look.
            Created::Exists => assert!(taken || found == ours),
        }
        counts[usize::from(created == Created::New)] += 1;
    }
    assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
}

#[test]
fn a_store_that_ignores_conditions_is_refused() {
    let Some(emulator) = Emulator::start(Protocol::S3) else {
        return;
    };
    let proxy = FaultyStore::start(&emulator.address, Random::new(1));
    proxy.ignore_conditions();
    let mut site = job_site();
    site.environment = emulator.environment(&proxy.address);
    let url = emulator.url("old");
    let said = run(site.shipper_program().args(site.init(&url))).failure();
    assert!(said.contains("cannot hold a vault"), "{said}");
    assert!(said.contains("replaces an object"), "{said}");
    let bucket = VaultUrl::parse(&url).unwrap();
    let environment = emulator.environment(&emulator.address);
    let store = bucket.open_in(&environment.into_iter().collect()).unwrap();
    assert_eq!(store.list("").unwrap(), [], "nothing is left behind");
}

#[test]
fn signatures_of_azure_are_taken_and_wrong_keys_are_told() {
    let Some(emulator) = Emulator::start(Protocol::Azure) else {
        return;
    };
    let mut environment = emulator.environment(&emulator.address);
    let key = environment
        .iter()
        .position(|(name, _)| name == "AZURE_STORAGE_KEY")
        .unwrap();
    let good = environment[key].1.clone();
    environment[key] = ("AZURE_STORAGE_SAS_TOKEN".into(), SIGNATURE.into());
    // Not `open`: Azurite lacks the right to remove by a batch for signatures of accounts, and answers 500.
    let url = VaultUrl::parse(&emulator.url("signed")).unwrap();
    let names: Environment = environment.iter().cloned().collect();
    let store = url.open_in(&names).unwrap();
    assert_eq!(store.create("a", text("x")).unwrap(), Created::New);
    assert_eq!(store.create("a", text("y")).unwrap(), Created::Exists);
    assert_eq!(store.read("a", None).unwrap(), "x");
    assert_eq!(store.list("").unwrap().len(), 1);
    let wrong_key = (
        "AZURE_STORAGE_KEY".to_owned(),
        good.replacen("Eby8", "Ebz8", 1),
    );
    let wrong_signature = (
        "AZURE_STORAGE_SAS_TOKEN".to_owned(),
        SIGNATURE.replace("hzIAM", "hzIAN"),
    );
    for wrong in [wrong_key, wrong_signature] {
        let secret = wrong.1.clone();
        environment[key] = wrong;
        let mut site = job_site();
        site.environment = environment.clone();
        let said = run(site
            .shipper_program()
            .args(site.init(&emulator.url("wrong"))))
        .failure();
        assert!(said.contains("check the credentials"), "{said}");
        assert!(said.contains("403"), "{said}");
        assert!(!said.contains(&secret) && !said.contains("hzIAN"), "{said}");
    }
}

#[test]
fn what_is_wrong_with_a_bucket_is_told() {
    let Some(emulator) = Emulator::start(Protocol::S3) else {
        return;
    };
    let mut site = job_site();
    site.environment = emulator.environment(&emulator.address);
    let said = run(site.shipper_program().args(site.init("s3://absent/vault"))).failure();
    assert!(said.contains("no bucket absent"), "{said}");
    let said = run(site.shipper_program().args(site.init("s3://a:b@c/vault"))).failure();
    assert!(said.contains("environment"), "{said}");
    // A port at which nobody listens.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    site.environment = emulator.environment(&address);
    let said = run(site.shipper_program().args(site.init(&emulator.url("x")))).failure();
    assert!(
        said.contains("o connection") && said.contains("refused"),
        "{said}"
    );
}

#[test]
fn keys_of_a_profile_reach_the_store() {
    let Some(emulator) = Emulator::start(Protocol::S3) else {
        return;
    };
    let mut site = job_site();
    fs::create_dir(site.path(".aws")).unwrap();
    fs::write(
        site.path(".aws/credentials"),
        "[backup]\naws_access_key_id = key\naws_secret_access_key = secret\n",
    )
    .unwrap();
    let config = format!(
        "[profile backup]\nregion = us-east-1\nendpoint_url = http://{}\n",
        emulator.address
    );
    fs::write(site.path(".aws/config"), config).unwrap();
    site.environment = vec![
        ("HOME".into(), site.root().display().to_string()),
        ("AWS_PROFILE".into(), "backup".into()),
    ];
    let url = emulator.url("profile");
    run(site.shipper_program().args(site.init(&url))).success();
    site.environment[1].1 = "other".into();
    let said = run(site.shipper_program().args(site.init(&url))).failure();
    assert!(said.contains("\"other\""), "{said}");
}

#[test]
fn requests_are_counted_as_they_are_sent() {
    let Some(emulator) = Emulator::start(Protocol::S3) else {
        return;
    };
    let proxy = FaultyStore::start(&emulator.address, Random::from_environment("counts"));
    let environment: Environment = emulator.environment(&proxy.address).into_iter().collect();
    let url = VaultUrl::parse(&emulator.url("counts")).unwrap();
    let store = url.prepare_in(&environment).unwrap();
    proxy.set_faulty(true);
    for number in 0..50 {
        let key = format!("a/{number}");
        store.create(&key, text("0123456789")).unwrap();
        store.read(&key, Some(0..5)).unwrap();
    }
    store.list("a").unwrap();
    for number in 0..50 {
        store.delete(&format!("a/{number}")).unwrap();
    }
    let Requests {
        put,
        get,
        head,
        list,
        delete,
        credentials,
    } = store.counters().unwrap().sums();
    let seen = proxy.seen().requests;
    for (name, sum) in [
        ("PUT", put),
        ("GET", get),
        ("HEAD", head),
        ("LIST", list),
        ("DELETE", delete),
    ] {
        assert_eq!(sum.requests, seen[name], "{name}: {seen:?}");
    }
    assert_eq!(credentials.requests, 0);
    assert!(put.bytes >= 500 && get.bytes >= 250, "{put:?} {get:?}");
}
