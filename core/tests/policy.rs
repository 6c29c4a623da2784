//! Policies: the one-line form, files, and combinations that cannot be.

use proptest::prelude::*;
use thinkey_core::{
    Lambda, StorageKind,
    policy::{Choice, Fix, Heads, LayerTable, Life, Policy, PolicyError, Score, Store, ThinValues, Tokens},
    token::snapkv::Pool,
    wire,
};

fn lambda() -> impl Strategy<Value = Lambda> {
    (0u16..1000).prop_map(|x| Lambda::from_per_mille(x).unwrap())
}

fn layers() -> impl Strategy<Value = LayerTable> {
    prop::collection::vec((any::<u8>(), lambda()), 0..=32).prop_map(|runs| {
        let mut table = LayerTable::default();
        runs.into_iter().for_each(|(layers, lambda)| table.push(layers, lambda).unwrap());
        table
    })
}

fn policies() -> impl Strategy<Value = Policy> {
    let tokens = prop_oneof![
        Just(Tokens::All),
        any::<[u32; 2]>().prop_map(|[sinks, window]| Tokens::Window { sinks, window }),
        (any::<[u32; 3]>(), prop::bool::ANY).prop_map(|([capacity, window, kernel], avg)| Tokens::Snapkv {
            capacity,
            window: 1 + window % capacity.max(1),
            kernel: kernel | 1,
            pool: if avg { Pool::Avg } else { Pool::Max },
        }),
        any::<[u32; 2]>().prop_map(|[capacity, recent]| Tokens::H2o { capacity, recent: recent % capacity.max(1) }),
    ];
    let score = prop_oneof![
        Just(Score::Query),
        Just(Score::Residual),
        any::<u32>().prop_map(|tokens| Score::Sample { tokens }),
        (0u32..80).prop_map(|rows| Score::Sketch { rows }),
        Just(Score::L1),
        Just(Score::L2),
        any::<u64>().prop_map(|seed| Score::Random { seed }),
    ];
    let choice = prop_oneof![
        Just(Choice::Whole),
        lambda().prop_map(|lambda| Choice::Top { lambda }),
        (0u16..=1000).prop_map(|energy| Choice::Threshold { energy }),
        (lambda(), any::<u16>()).prop_map(|(lambda, minimum)| Choice::Adaptive { lambda, minimum }),
        (lambda(), any::<u16>()).prop_map(|(lambda, multiple)| Choice::Calibrated { lambda, multiple }),
        (lambda(), lambda()).prop_map(|(least, most)| Choice::Dynamic { least, most }),
        layers().prop_map(|table| Choice::Layers { table }),
    ];
    let fix = prop::sample::select(&[Fix::None, Fix::Compensated, Fix::Lowrank, Fix::Predictive][..]);
    let thin_values = prop_oneof![
        Just(ThinValues::Whole),
        lambda().prop_map(|lambda| ThinValues::Query { lambda }),
        lambda().prop_map(|lambda| ThinValues::L2 { lambda }),
    ];
    let store = || prop::sample::select(&Store::ALL[..]);
    let heads = prop::sample::select(&[Heads::Kv, Heads::Query][..]);
    let life = prop_oneof![3 => Just(Life::Prompt), 1 => Just(Life::Turn), 1 => any::<u32>().prop_map(|tokens| Life::Every { tokens })];
    (tokens, score, choice, fix, thin_values, store(), store(), heads, life).prop_map(
        |(tokens, score, choice, fix, thin_values, keys, values, heads, life)| Policy {
            tokens,
            score,
            choice,
            fix,
            thin_values,
            keys,
            values,
            heads,
            life,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn a_line_reads_back(policy in policies()) {
        match policy.check() {
            Ok(()) => prop_assert_eq!(policy.to_string().parse(), Ok(policy), "{}", policy),
            // A table of nothing cannot be written.
            Err(_) if matches!(policy.choice, Choice::Layers { table } if table.layers() == 0) => {
                prop_assert!(policy.to_string().parse::<Policy>().is_err(), "{}", policy);
            }
            Err(error) => prop_assert_eq!(policy.to_string().parse::<Policy>(), Err(error), "{}", policy),
        }
    }

    #[test]
    fn files_and_frames_read_back(policy in policies()) {
        // TOML's integers have 63 bits.
        let fits = !matches!(policy.score, Score::Random { seed } if seed > i64::MAX as u64);
        if fits {
            prop_assert_eq!(toml::from_str::<Policy>(&toml::to_string(&policy).unwrap()).unwrap(), policy);
        }
        prop_assert_eq!(serde_json::from_str::<Policy>(&serde_json::to_string(&policy).unwrap()).unwrap(), policy);
        let mut memory = [0; 256];
        prop_assert_eq!(wire::decode::<Policy>(wire::encode(&policy, &mut memory).unwrap()), Ok(policy));
    }

    #[test]
    fn no_line_panics(line in "([a-z0-9=(),. λ-]|tokens=|snapkv\\(|choice=|top\\(|balanced){0,24}") {
        let _ = line.parse::<Policy>();
    }
}

#[test]
fn presets_are_possible_and_keep_their_names() {
    for (name, policy) in Policy::PRESETS {
        assert_eq!(policy.check(), Ok(()), "{name}");
        assert_eq!(name.parse(), Ok(policy));
        assert_eq!(policy.to_string(), name);
    }
    assert_eq!(Policy::default(), Policy::FULL);
}

#[test]
fn what_is_wrong_is_said_where() {
    for (line, at, expected) in [
        ("", 0, "slot=value"),
        ("balanced,", 9, "slot=value"),
        ("keys=int4,think", 10, "only as the first"),
        ("keys=int5", 5, "int8"),
        ("think, colour=blue", 7, "a slot"),
        ("choice=top(.5", 13, "closing"),
        ("choice=top(.5555)", 11, "three decimals"),
        ("choice=top(1)", 11, "below 1"),
        ("choice=top(.5,8)", 14, "no further"),
        ("choice=top", 10, "a share"),
        ("keys=int4(3)", 10, "no further"),
        ("tokens=snapkv(1024,32,7,median)", 24, "avg or max"),
        ("tokens=h2o(+5,1)", 11, "tokens"),
        ("full,lambda=.5", 5, "choice that has one"),
        ("choice=layers", 13, "count*λ"),
        ("choice=layers()", 14, "count*λ"),
        ("choice=layers(.5,)", 17, "count*λ"),
        ("choice=layers(.5, 0*.4)", 17, "1 to 255"),
        ("choice=layers(256*.5)", 14, "1 to 255"),
        ("choice=layers(+2*.5)", 14, "1 to 255"),
        ("choice=layers(2*.5*2)", 14, "count*λ"),
        ("choice=layers(2*1)", 14, "below 1"),
        ("choice=layers(3*.5),lambda=.4", 20, "choice that has one"),
    ] {
        match line.parse::<Policy>() {
            Err(PolicyError::Syntax { at: found, expected: text }) => {
                assert!(found == at && text.contains(expected), "{line}: at {found}: {text}");
            }
            other => panic!("{line}: {other:?}"),
        }
    }
}

#[test]
fn combinations_that_cannot_be_name_both_parts() {
    for (line, first, second) in [
        ("fix=compensated", "choice=whole", "fix"),
        ("choice=top(.5),fix=lowrank,heads=query", "heads=query", "fix"),
        ("choice=adaptive(.5,8),heads=query", "heads=query", "choice"),
        ("choice=threshold(.9),fix=lowrank", "choice=threshold", "fix=lowrank"),
        ("life=turn", "choice=whole", "life"),
        ("choice=top(.5),score=residual,fix=lowrank", "score=residual", "fix"),
        ("choice=top(.5),fix=predictive,keys=int4/2", "fix=predictive", "score"),
        ("choice=top(.5),score=residual,fix=predictive", "fix=predictive", "keys"),
        ("choice=top(.5),score=residual,fix=compensated,keys=int4/2", "keys=int4/2", "fix"),
        ("values=int4/2", "values", "int4/2"),
        ("tokens=h2o(512,32),score=residual,choice=top(.5),fix=predictive,keys=int4", "tokens", "fix=predictive"),
        ("balanced,fix=predictive,heads=query", "heads=query", "fix"),
        ("balanced,life=every(256)", "life", "fix"),
        ("choice=threshold(.9),life=turn", "life", "choice"),
    ] {
        match line.parse::<Policy>() {
            Err(PolicyError::Conflict { first: a, second: b, .. }) => assert_eq!((a, b), (first, second), "{line}"),
            other => panic!("{line}: {other:?}"),
        }
    }
    for line in [
        "tokens=snapkv(16,32,7,avg)",
        "tokens=snapkv(64,32,6,avg)",
        "tokens=window(4,0)",
        "tokens=h2o(8,9)",
        "score=sample(0)",
        "score=sketch(65)",
        "choice=threshold(0)",
        "choice=adaptive(.5,0)",
        "choice=calibrated(.5,0)",
        "choice=dynamic(.6,.5)",
        "choice=top(.5),life=every(0)",
    ] {
        let error = line.parse::<Policy>().unwrap_err();
        assert!(matches!(error, PolicyError::Range { .. }) && error.to_string().len() > 20, "{line}: {error}");
    }
}

#[test]
fn a_score_is_read_alone() {
    assert_eq!(" sample( 256 ) ".parse(), Ok(Score::Sample { tokens: 256 }));
    assert_eq!("random(7)".parse(), Ok(Score::Random { seed: 7 }));
    for (text, at) in [("", 0), (" l3", 1), ("sample(1,2)", 9), ("l2(3)", 3), ("sketch(8", 8)] {
        assert!(matches!(text.parse::<Score>(), Err(PolicyError::Syntax { at: found, .. }) if found == at), "{text}");
    }
    assert!(matches!("sketch(65)".parse::<Score>(), Err(PolicyError::Range { slot: "score=sketch", .. })));
}

#[test]
fn files_name_slots_as_lines_do() {
    let policy: Policy = toml::from_str(
        "tokens = { snapkv = { capacity = 1024, window = 32, kernel = 7, pool = \"avg\" } }\n\
         choice = { top = { lambda = 400 } }\nkeys = \"int4\"\nthin-values = { l2 = { lambda = 300 } }\n",
    )
    .unwrap();
    let line = "tokens=snapkv(1024,32,7,avg),choice=top(.4),thin-values=l2(.3),keys=int4";
    assert_eq!(Ok(policy), line.parse());
    assert!(toml::from_str::<Policy>("colour = \"blue\"").is_err());
    assert!(toml::from_str::<Policy>("choice = { top = { lambda = 1000 } }").is_err());
}

#[test]
fn layers_have_a_lambda_each() {
    let policy: Policy = "choice=layers( .25, .25 ,2*.25, 0.5,3 * 0 )".parse().unwrap();
    assert_eq!(policy.to_string(), "choice=layers(4*.25,.5,3*0)");
    let Choice::Layers { table } = policy.choice else { panic!("{policy}") };
    assert!(table.lambdas().map(Lambda::per_mille).eq([250, 250, 250, 250, 500, 0, 0, 0]));
    assert_eq!((policy.lambda(), table.layers()), (None, 8));
    let text = serde_json::to_string(&policy.choice).unwrap();
    assert_eq!(text, r#"{"layers":{"table":[[4,250],[1,500],[3,0]]}}"#);
    let file = "choice = { layers = { table = [[4, 250], [1, 500], [3, 0]] } }";
    assert_eq!(toml::from_str(file), Ok(policy));
    for table in ["[[1, 1000]]", "[[256, 1]]", "[[1]]", "[4]"] {
        assert!(
            toml::from_str::<Policy>(&format!("choice = {{ layers = {{ table = {table} }} }}")).is_err(),
            "{table}"
        );
    }
    let empty: Policy = toml::from_str("choice = { layers = { table = [] } }").unwrap();
    assert!(matches!(empty.check(), Err(PolicyError::Range { slot: "choice=layers", .. })));

    let runs = |count: u16| (0..count).map(|at| format!(".{:03}", 1 + at)).collect::<Vec<_>>().join(",");
    assert!(format!("choice=layers({})", runs(32)).parse::<Policy>().is_ok());
    let error = format!("choice=layers({})", runs(33)).parse::<Policy>().unwrap_err();
    assert!(
        matches!(error, PolicyError::Syntax { at: 174, .. }) && error.to_string().contains("at most 32"),
        "{error}"
    );

    let error = policy.with_lambda(Lambda::from_per_mille(300).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "lambda does not go with choice=layers: each layer has its own");
    assert_eq!(policy.with_lambda(Lambda::WHOLE), Ok(Policy::FULL));
}

#[test]
fn predicted_keys_are_written_and_read() {
    let line = "score=residual,choice=calibrated(.4,8),fix=predictive,keys=int4/2,values=turned2";
    let policy: Policy = line.parse().unwrap();
    assert_eq!((policy.fix, policy.keys), (Fix::Predictive, Store::Int4Int2));
    assert_eq!(policy.to_string(), line);
    let text = serde_json::to_string(&policy).unwrap();
    assert!(text.contains("\"keys\":\"int4/2\""), "{text}");
    // Without a choice channels have no order.
    let whole = policy.with_lambda(Lambda::WHOLE).unwrap();
    assert_eq!((whole.check(), whole.keys), (Ok(()), Store::Int4));
}

#[test]
fn storage_kinds_of_this_build_are_found_by_name() {
    assert_eq!(Store::ALL.len(), StorageKind::ALL.len());
    for store in Store::ALL {
        assert_eq!(StorageKind::try_from(store).unwrap().name(), store.name());
    }
}
