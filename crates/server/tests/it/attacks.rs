//! That nothing is open which should not be: every path is tried without a key, with a wrong one and with the right one.

use engine::Scripted;
use serde_json::Value;
use server::Options;

use crate::fixture::{Fixture, JSON, engine_options, options, tokens};

#[test]
fn every_path_asks_for_its_key() {
    let options = Options {
        api_keys: vec!["ordinary".to_owned()],
        admin_keys: vec!["admin".to_owned()],
        metrics_keys: vec!["metrics".to_owned()],
        sleep_mode: true,
        ..options()
    };
    let backend = Scripted::new(Scripted::gpt_oss(), vec![tokens("Hi<|return|>")]);
    let server = Fixture::start(&options, backend, engine_options());
    let described: Value = server.get("/openapi.json").ok();
    let mut seen = 0;
    for (path, operations) in described["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            seen += 1;
            let (path, method) = (path.replace("{id}", "x"), method.to_uppercase());
            let ask = |key: Option<&str>| {
                let key = key.map_or(String::new(), |key| format!("authorization: Bearer {key}\r\n"));
                server.request(&method, &path, &format!("{JSON}{key}"), b"{}").status
            };
            let admin = ["prefix_cache", "abort", "server_info", "profile", "sleep", "wake"];
            let right = match path.as_str() {
                "/metrics" => Some("metrics"),
                path if admin.iter().any(|name| path.contains(name)) => Some("admin"),
                _ if operation["security"] == serde_json::json!([]) => None,
                _ => Some("ordinary"),
            };
            for key in [None, Some("wrong"), Some("ordinary"), Some("admin"), Some("metrics")] {
                let admitted = right.is_none() || key == right;
                assert_eq!(ask(key) != 401, admitted, "{method} {path} with {key:?}");
            }
        }
    }
    assert!(seen > 35, "{seen} operations");
    // What is open to all is a short list.
    let open = |operations: &Value| {
        operations.as_object().unwrap().values().all(|o| o["security"] == serde_json::json!([]))
    };
    let found: Vec<&String> = described["paths"]
        .as_object()
        .unwrap()
        .iter()
        .filter(|(_, o)| open(o))
        .map(|(path, _)| path)
        .collect();
    let expected =
        ["/health", "/live", "/ready", "/ping", "/version", "/load", "/", "/docs", "/openapi.json"];
    assert_eq!(found, expected);
}
