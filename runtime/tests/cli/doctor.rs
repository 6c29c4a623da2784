//! `thinkey doctor`.

use super::command::{Run, run, thinkey};
use serde_json::Value;

fn doctor(arguments: &[&str], environment: &[(&str, &str)]) -> Run {
    let home = tempfile::tempdir().unwrap();
    let mut command = thinkey(home.path());
    // Where nothing of CUDA is: whatever the machine has, its compiler's headers are not found.
    command.env("CUDA_PATH", home.path()).envs(environment.iter().copied());
    run(command.arg("doctor").args(arguments), "")
}

fn json(environment: &[(&str, &str)]) -> Value {
    serde_json::from_str(&doctor(&["--json"], environment).ok()).unwrap()
}

fn device<'a>(report: &'a Value, name: &str) -> &'a Value {
    let devices = report["devices"].as_array().unwrap();
    devices.iter().find(|device| device["device"] == name).unwrap_or_else(|| panic!("{name} in {report}"))
}

#[test]
fn the_machine_is_told() {
    let report = json(&[]);
    let sets = report["instruction_sets"].as_array().unwrap();
    assert_eq!(sets[0], "portable");
    assert_eq!(report["instruction_set"], *sets.last().unwrap());
    assert!(report["threads"].as_u64().unwrap() >= 1);
    assert_eq!(report["architecture"], std::env::consts::ARCH);
    #[cfg(target_os = "linux")]
    {
        let memory = |name: &str| report["machine"]["memory"][name].as_u64().unwrap();
        assert!(memory("available") > 0 && memory("available") <= memory("total"), "{report}");
    }
    let text = doctor(&[], &[]).ok();
    for set in sets {
        assert!(text.contains(set.as_str().unwrap()), "{text}");
    }
    assert!(text.contains("\n--device ndarray  yes (the default): "), "{text}");
}

#[test]
fn what_stands_in_the_way_of_cuda_is_told_with_a_way_out() {
    let report = json(&[]);
    let cuda = device(&report, "cuda");
    assert_eq!(cuda["usable"], false, "{report}");
    let (reason, remedy) = (cuda["reason"].as_str().unwrap(), cuda["remedy"].as_str().unwrap());
    if cfg!(feature = "cuda") {
        assert!(report["cuda"].is_object() && report["cuda"]["headers"].is_null(), "{report}");
        let known = ["driver", "device", "compiler", "headers"];
        assert!(known.iter().any(|part| reason.contains(part)), "{reason}");
    } else {
        assert!(report["cuda"].is_null());
        assert!(reason.contains("built without CUDA") && remedy.contains("--features cuda"), "{reason}; {remedy}");
    }
    // Those who ask for it are told the same.
    let text = doctor(&[], &[]).ok();
    assert!(text.contains(&format!("\n--device cuda     no: {reason}\n")) && text.contains(remedy), "{text}");
}

#[test]
fn an_instruction_set_that_is_not_there_is_told() {
    let report = json(&[("THINKEY_ISA", "mmx")]);
    let ndarray = device(&report, "ndarray");
    assert_eq!((&ndarray["usable"], &report["instruction_set"]), (&false.into(), &Value::Null));
    assert!(ndarray["reason"].as_str().unwrap().contains("\"mmx\""), "{report}");
    assert!(ndarray["remedy"].as_str().unwrap().contains("THINKEY_ISA"), "{report}");
    let report = json(&[("THINKEY_ISA", "portable")]);
    assert_eq!((&device(&report, "ndarray")["usable"], &report["instruction_set"]), (&true.into(), &"portable".into()));
}
