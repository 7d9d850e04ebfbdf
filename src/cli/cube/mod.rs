//! `mneme cube`: memory cubes of a running server, and files of cubes without one.

mod client;
mod fuse;
mod offline;
mod print;

use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use self::client::Client;
use self::fuse::FuseArgs;
use self::print::Printer;
use super::engine_args::parse_bytes;

/// Make, find, change and check the memory cubes of a running server.
#[derive(Debug, Args)]
pub(crate) struct CubeArgs {
    /// Where the server is
    #[arg(long, env = "MNEME_URL", default_value = "http://127.0.0.1:8000", global = true)]
    url: String,
    /// The key that opens it
    #[arg(long, env = "MNEME_API_KEY", hide_env_values = true, global = true)]
    api_key: Option<String>,
    /// Print the server's answer as it is
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: CubeCommand,
}

#[derive(Debug, Subcommand)]
enum CubeCommand {
    /// Make a cube of a text, and compute its KV; or of an adapter
    Create(CreateArgs),
    /// List cubes, in order of name
    List(ListArgs),
    /// Show one cube, or one version of it
    Show(ShowArgs),
    /// Delete a cube with all its versions
    Delete(NameArgs),
    /// Keep a cube's blocks from eviction
    Pin(NameArgs),
    /// Let a cube's blocks be evicted like those of others
    Unpin(NameArgs),
    /// Give a cube another name
    Rename(TwoNamesArgs),
    /// Make a cube of your own from another
    Fork(TwoNamesArgs),
    /// Add text to the end of a cube, as a new version; or give an adapter's cube another adapter
    Append(AppendArgs),
    /// Read a cube's blocks and compare their digests
    Verify(NameArgs),
    /// Make one adapter out of several; needs no server
    Fuse(FuseArgs),
    /// Write a cube, its KV included, to a file
    Export(ExportArgs),
    /// Make a cube of a file that export wrote
    Import(ImportArgs),
    /// Note which versions the cubes of a namespace have, or one cube
    Snapshot(ScopeArgs),
    /// List the snapshots of a namespace or a cube
    Snapshots(ScopeArgs),
    /// Compare with a snapshot
    Diff(SnapshotArgs),
    /// Go back to a snapshot: old content becomes new versions
    Restore(SnapshotArgs),
    /// Forget a snapshot
    DropSnapshot(SnapshotArgs),
}

#[derive(Debug, Args)]
struct ScopeArgs {
    /// A namespace, or namespace/path
    scope: String,
}

#[derive(Debug, Args)]
struct SnapshotArgs {
    #[command(flatten)]
    scope: ScopeArgs,
    /// The snapshot's id
    snapshot: String,
}

/// The vault of a server that does not run.
#[derive(Debug, Args)]
struct OfflineArgs {
    /// Folder of a vault that no server uses, instead of a server
    #[arg(long, value_name = "DIR")]
    vault: Option<PathBuf>,
    /// Most bytes of KV blocks in that vault, with an optional suffix K, M or G; as the server has it
    #[arg(long, value_parser = parse_bytes, default_value = "8G", requires = "vault")]
    vault_size_bytes: usize,
}

#[derive(Debug, Args)]
struct ExportArgs {
    #[command(flatten)]
    cube: NameArgs,
    /// The file to write
    file: PathBuf,
    #[command(flatten)]
    offline: OfflineArgs,
}

#[derive(Debug, Args)]
struct ImportArgs {
    /// The file to read
    file: PathBuf,
    /// What the cube will be called [default: what it was called]
    #[arg(long)]
    name: Option<String>,
    /// Have the KV computed anew when it is another model's
    #[arg(long, conflicts_with = "vault")]
    rebuild: bool,
    #[command(flatten)]
    offline: OfflineArgs,
}

#[derive(Debug, Args)]
struct NameArgs {
    /// namespace/path; show, fork and verify also take namespace/path@version
    name: String,
}

#[derive(Debug, Args)]
struct TwoNamesArgs {
    #[command(flatten)]
    cube: NameArgs,
    /// The new name
    new_name: String,
}

/// What goes into a cube.
#[derive(Debug, Args)]
struct ContentArgs {
    /// The text itself
    #[arg(long, conflicts_with_all = ["file", "messages"])]
    text: Option<String>,
    /// A file with the text; - is standard input, which is also read when nothing is given
    #[arg(long, conflicts_with = "messages")]
    file: Option<PathBuf>,
    /// A file with a conversation: a JSON list of messages
    #[arg(long)]
    messages: Option<PathBuf>,
    /// An adapter, as the server finds it below its --lora-root: a folder as PEFT writes it, or a GGUF file
    #[arg(long, value_name = "PATH", conflicts_with_all = ["text", "file", "messages"])]
    adapter: Option<String>,
}

#[derive(Debug, Args)]
struct CreateArgs {
    #[command(flatten)]
    cube: NameArgs,
    #[command(flatten)]
    content: ContentArgs,
    /// Keep the text alone, without KV
    #[arg(long, conflicts_with = "adapter")]
    plaintext: bool,
    /// What kind of request it is for [default: chat, where the model has a template]
    #[arg(long, conflicts_with = "adapter")]
    target: Option<Target>,
    /// A word to find it by; may be given several times
    #[arg(long)]
    tag: Vec<String>,
    /// Seconds after which it ends
    #[arg(long)]
    ttl: Option<u64>,
    /// Let everybody read it
    #[arg(long)]
    public: bool,
    /// Answer before it is on disk
    #[arg(long)]
    no_durable: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Target {
    Chat,
    Completion,
}

#[derive(Debug, Args)]
struct AppendArgs {
    #[command(flatten)]
    cube: NameArgs,
    #[command(flatten)]
    content: ContentArgs,
}

#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    cube: NameArgs,
    /// Also print what it holds
    #[arg(long)]
    payload: bool,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Of this namespace
    #[arg(long)]
    namespace: Option<String>,
    /// plaintext, activation or parameter
    #[arg(long)]
    kind: Option<String>,
    /// generated, activated, archived or frozen
    #[arg(long)]
    state: Option<String>,
    /// With this tag
    #[arg(long)]
    tag: Option<String>,
    /// With this in name, tags or text
    #[arg(long)]
    query: Option<String>,
    /// At most this many; the rest is asked for with --after
    #[arg(long)]
    limit: Option<usize>,
    /// Behind this name
    #[arg(long)]
    after: Option<String>,
}

/// Runs the command.
pub(crate) fn run(args: CubeArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.url, args.api_key.as_deref())?;
    let (answer, print) = args.command.ask(&client)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &answer)?;
        writeln!(out)?;
    } else {
        print(&answer, &mut out)?;
    }
    Ok(())
}

impl CubeCommand {
    /// Asks the server; the answer, and how it is printed.
    fn ask(&self, client: &Client) -> anyhow::Result<(Value, Printer)> {
        Ok(match self {
            Self::Create(args) => (client.post("/v1/memcubes", &args.body()?)?, print::made),
            Self::List(args) => (client.get("/v1/memcubes", &args.query())?, print::list),
            Self::Show(args) => {
                let include = if args.payload { "payload" } else { "" };
                (client.get(&path(&args.cube.name, "")?, &[("include", include.to_owned())])?, print::cube)
            }
            Self::Delete(args) => (client.delete(&path(&args.name, "")?, &[])?, print::deleted),
            Self::Pin(args) => (client.post(&path(&args.name, "/pin")?, &json!({}))?, print::changed),
            Self::Unpin(args) => (client.post(&path(&args.name, "/unpin")?, &json!({}))?, print::changed),
            Self::Rename(args) => (args.post(client, "/rename")?, print::changed),
            Self::Fork(args) => (args.post(client, "/fork")?, print::changed),
            Self::Append(args) => {
                let body = Value::Object(args.content.body()?);
                (client.post(&path(&args.cube.name, "/append")?, &body)?, print::made)
            }
            Self::Verify(args) => (client.post(&path(&args.name, "/verify")?, &json!({}))?, print::verified),
            Self::Fuse(args) => (args.run()?, print::fused),
            Self::Export(args) => (args.export(client)?, print::exported),
            Self::Import(args) => (args.import(client)?, print::made),
            Self::Snapshot(args) => (client.post(&args.path("/snapshot")?, &json!({}))?, print::snapshot),
            Self::Snapshots(args) => (client.get(&args.path("/snapshot")?, &[])?, print::snapshots),
            Self::Diff(args) => {
                let query = [("snapshot", args.snapshot.clone())];
                (client.get(&args.scope.path("/snapshot")?, &query)?, print::differences)
            }
            Self::Restore(args) => {
                let body = json!({ "snapshot": args.snapshot });
                (client.post(&args.scope.path("/restore")?, &body)?, print::restorations)
            }
            Self::DropSnapshot(args) => {
                let query = [("snapshot", args.snapshot.clone())];
                (client.delete(&args.scope.path("/snapshot")?, &query)?, print::dropped)
            }
        })
    }
}

/// The path of a cube. The server checks the name; here only what would lead to another route is refused.
fn path(name: &str, action: &str) -> anyhow::Result<String> {
    anyhow::ensure!(
        name.contains('/') && is_plain(name),
        "'{}' is no cube name: expected namespace/path of letters, digits, '-', '_' and '.'",
        name.escape_debug()
    );
    Ok(format!("/v1/memcubes/{name}{action}"))
}

/// Whether nothing in it leads anywhere else.
fn is_plain(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./@".contains(c);
    name.chars().all(is_plain) && !name.contains("..")
}

impl ScopeArgs {
    fn path(&self, action: &str) -> anyhow::Result<String> {
        let is_name = !self.scope.is_empty() && is_plain(&self.scope);
        anyhow::ensure!(is_name, "'{}' is neither a namespace nor a cube's name", self.scope.escape_debug());
        Ok(format!("/v1/memcubes/{}{action}", self.scope))
    }
}

impl ExportArgs {
    /// Under another name first: a file of this name is whole.
    fn export(&self, client: &Client) -> anyhow::Result<Value> {
        let partial = self.file.with_added_extension("partial");
        let num_bytes = match &self.offline.vault {
            Some(vault) => offline::export(vault, self.offline.vault_size_bytes as u64, &self.cube.name, &partial),
            None => client.download(&path(&self.cube.name, "/export")?, &partial),
        };
        let num_bytes = num_bytes.inspect_err(|_| drop(std::fs::remove_file(&partial)))?;
        std::fs::rename(&partial, &self.file).with_context(|| format!("cannot write {}", self.file.display()))?;
        Ok(json!({ "name": self.cube.name, "file": self.file.display().to_string(), "bytes": num_bytes }))
    }
}

impl ImportArgs {
    fn import(&self, client: &Client) -> anyhow::Result<Value> {
        if let Some(vault) = &self.offline.vault {
            return offline::import(vault, self.offline.vault_size_bytes as u64, &self.file, self.name.as_deref());
        }
        let rebuild = if self.rebuild { "true" } else { "" };
        let query = [("name", self.name.clone().unwrap_or_default()), ("rebuild", rebuild.to_owned())];
        client.upload("/v1/memcubes/import", &query, &self.file)
    }
}

impl TwoNamesArgs {
    fn post(&self, client: &Client, action: &str) -> anyhow::Result<Value> {
        client.post(&path(&self.cube.name, action)?, &json!({ "name": self.new_name }))
    }
}

impl CreateArgs {
    fn body(&self) -> anyhow::Result<Value> {
        let mut body = self.content.body()?;
        body.insert("name".into(), self.cube.name.clone().into());
        let kind = match (&self.content.adapter, self.plaintext) {
            (Some(_), _) => "parameter",
            (None, true) => "plaintext",
            (None, false) => "activation",
        };
        body.insert("kind".into(), kind.into());
        body.insert("durable".into(), (!self.no_durable).into());
        body.insert("tags".into(), self.tag.clone().into());
        if let Some(target) = self.target {
            let target = match target {
                Target::Chat => "chat",
                Target::Completion => "completion",
            };
            body.insert("target".into(), target.into());
        }
        if let Some(ttl) = self.ttl {
            body.insert("ttl_s".into(), ttl.into());
        }
        if self.public {
            body.insert("acl".into(), json!({ "visibility": "public" }));
        }
        Ok(Value::Object(body))
    }
}

impl ContentArgs {
    /// The content as fields of a body.
    fn body(&self) -> anyhow::Result<Map<String, Value>> {
        let mut body = Map::new();
        if let Some(path) = &self.adapter {
            body.insert("adapter".into(), path.clone().into());
            return Ok(body);
        }
        if let Some(path) = &self.messages {
            let messages: Value = serde_json::from_str(&read(path)?)
                .with_context(|| format!("{} is no JSON list of messages", path.display()))?;
            body.insert("messages".into(), messages);
            return Ok(body);
        }
        let text = match (&self.text, &self.file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => read(path)?,
            (None, None) => read(std::path::Path::new("-"))?,
        };
        body.insert("text".into(), text.into());
        Ok(body)
    }
}

fn read(path: &std::path::Path) -> anyhow::Result<String> {
    if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(text);
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

impl ListArgs {
    fn query(&self) -> Vec<(&'static str, String)> {
        let fields = [
            ("namespace", self.namespace.clone()),
            ("kind", self.kind.clone()),
            ("state", self.state.clone()),
            ("tag", self.tag.clone()),
            ("q", self.query.clone()),
            ("after", self.after.clone()),
            ("limit", self.limit.map(|limit| limit.to_string())),
        ];
        fields.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        cube: CubeArgs,
    }

    fn command(line: &str) -> CubeCommand {
        Command::try_parse_from(line.split(' ')).unwrap().cube.command
    }

    #[test]
    fn arguments_become_the_fields_of_a_body() {
        let CubeCommand::Create(args) =
            command("cube create ana/a --text Hi --tag x --tag y --ttl 60 --public --target chat")
        else {
            panic!("another command")
        };
        let wanted = json!({
            "text": "Hi", "name": "ana/a", "kind": "activation", "durable": true, "tags": ["x", "y"],
            "target": "chat", "ttl_s": 60, "acl": { "visibility": "public" }
        });
        assert_eq!(args.body().unwrap(), wanted);
        let CubeCommand::Create(args) = command("cube create ana/style --adapter style.gguf --tag x") else {
            panic!("another command")
        };
        let wanted = json!({
            "name": "ana/style", "kind": "parameter", "adapter": "style.gguf", "durable": true, "tags": ["x"]
        });
        assert_eq!(args.body().unwrap(), wanted);
        assert!(Command::try_parse_from("cube create ana/style --adapter a --text b".split(' ')).is_err());
        let CubeCommand::List(args) = command("cube list --namespace ana --query tea --limit 5") else {
            panic!("another command")
        };
        let query = args.query();
        assert_eq!(query, [("namespace", "ana".to_owned()), ("q", "tea".to_owned()), ("limit", "5".to_owned())]);
    }

    #[test]
    fn files_are_read_as_text_or_as_messages() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, r#"[{"role": "user", "content": "Hi"}]"#).unwrap();
        let text = ContentArgs { text: None, file: Some(file.clone()), messages: None, adapter: None };
        assert!(text.body().unwrap()["text"].as_str().unwrap().starts_with("[{"));
        let messages = ContentArgs { text: None, file: None, messages: Some(file.clone()), adapter: None };
        assert_eq!(messages.body().unwrap()["messages"][0]["content"], "Hi");
        std::fs::write(&file, "{").unwrap();
        let error = messages.body().unwrap_err().to_string();
        assert!(error.contains("JSON"), "{error}");
    }

    #[test]
    fn a_vault_is_read_instead_of_a_server() {
        let CubeCommand::Export(args) = command("cube export ana/a file --vault /v --vault-size-bytes 1G") else {
            panic!("another command")
        };
        assert_eq!((args.offline.vault, args.offline.vault_size_bytes), (Some("/v".into()), 1 << 30));
        let refused = ["cube import file --rebuild --vault /v", "cube export ana/a file --vault-size-bytes 1G"];
        assert!(refused.iter().all(|line| Command::try_parse_from(line.split(' ')).is_err()));
    }

    #[test]
    fn names_cannot_lead_to_another_route() {
        assert_eq!(path("ana/a@2", "/verify").unwrap(), "/v1/memcubes/ana/a@2/verify");
        let scope = |scope: &str| ScopeArgs { scope: scope.to_owned() }.path("/snapshot");
        assert_eq!(scope("ana").unwrap(), "/v1/memcubes/ana/snapshot");
        assert!(scope("").is_err() && scope("ana?x").is_err());
        for name in ["a", "a/../../health", "a/b?x=1", "a/b#c", "a/b c", "a/%2e%2e"] {
            assert!(path(name, "").is_err(), "{name}");
        }
    }
}
