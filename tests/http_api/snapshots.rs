//! Snapshots of cubes over HTTP.

use serde_json::{Value, json};

use crate::cubes::Setup;

fn column<'a>(answer: &'a Value, field: &str) -> Vec<(&'a str, &'a Value)> {
    let rows = answer["data"].as_array().expect("a list");
    rows.iter().map(|row| (row["name"].as_str().expect("a name"), &row[field])).collect()
}

#[test]
fn a_namespace_is_noted_compared_and_restored() {
    let setup = Setup::new();
    setup.create("ana/a", "Tea.");
    setup.create("ana/b", "Coffee.");
    let reply = setup.send("POST", "/v1/memcubes/ana/snapshot", "", None);
    assert_eq!(reply.status, 201, "{}", reply.text());
    let made = reply.json();
    assert_eq!((&made["scope"], &made["restored_tokens"]), (&json!("ana"), &json!(0)));
    assert_eq!(made["cubes"], json!([{ "name": "ana/a", "version": 1 }, { "name": "ana/b", "version": 1 }]));
    let id = made["id"].as_str().unwrap();
    let listed = setup.ok("GET", "/v1/memcubes/ana/snapshot", None);
    assert_eq!(listed["data"][0]["id"], *id);
    setup.ok("POST", "/v1/memcubes/ana/a/append", Some(json!({ "text": " And more." })));
    setup.ok("DELETE", "/v1/memcubes/ana/b", None);
    let diff = setup.ok("GET", &format!("/v1/memcubes/ana/snapshot?snapshot={id}"), None);
    assert_eq!(column(&diff, "change"), [("ana/a", &json!("changed")), ("ana/b", &json!("gone"))]);
    setup.cubes.prefills();
    let restored = setup.ok("POST", "/v1/memcubes/ana/restore", Some(json!({ "snapshot": id })));
    assert_eq!(column(&restored, "outcome"), [("ana/a", &json!("restored")), ("ana/b", &json!("gone"))]);
    assert!(setup.cubes.prefills().is_empty(), "nothing is computed");
    let shown = setup.get("ana/a?include=payload");
    assert_eq!((&shown["version"], &shown["text"]), (&json!(3), &json!("Tea.")));
    assert_eq!(setup.get("ana/a@2?include=payload")["text"], "Tea. And more.");
    let path = format!("/v1/memcubes/ana/snapshot?snapshot={id}");
    assert_eq!(setup.ok("DELETE", &path, None)["deleted"], true);
    assert_eq!(setup.refused("GET", &path, None).0, 404);
    let events = setup.send("GET", "/v1/memcubes/events?type=restored", "", None);
    assert!(events.text().contains("\"version\":3"), "{}", events.text());
}

#[test]
fn one_cube_has_snapshots_of_its_own() {
    let setup = Setup::new();
    setup.create("ana/a", "Tea.");
    let made = setup.send("POST", "/v1/memcubes/ana/a/snapshot", "", None).json();
    assert_eq!(made["scope"], "ana/a");
    assert_eq!(setup.ok("GET", "/v1/memcubes/ana/snapshot", None)["data"], json!([]));
    let id = made["id"].as_str().unwrap();
    for (method, path, body, status) in [
        ("POST", "/v1/memcubes/nobody/snapshot".to_owned(), None, 404),
        ("POST", "/v1/memcubes/No%20Body/snapshot".to_owned(), None, 400),
        ("POST", "/v1/memcubes/ana/restore".to_owned(), Some(json!({ "snapshot": id })), 404),
        ("POST", "/v1/memcubes/ana/a/restore".to_owned(), Some(json!({ "snapshot": "nonsense" })), 400),
        ("POST", "/v1/memcubes/ana/a/restore".to_owned(), Some(json!({})), 400),
        ("GET", "/v1/memcubes/ana/a/snapshot?snapshot=nonsense".to_owned(), None, 400),
        ("DELETE", "/v1/memcubes/ana/a/snapshot".to_owned(), None, 400),
        ("DELETE", format!("/v1/memcubes/ana/snapshot?snapshot={id}"), None, 404),
    ] {
        assert_eq!(setup.refused(method, &path, body).0, status, "{method} {path}");
    }
}
