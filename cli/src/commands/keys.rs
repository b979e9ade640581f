//! `hetmem ls`, `stat`, `rm`, `pin` and `unpin`: what concerns keys. Not bytes. Invariant: a command over several
//! keys does all of them, and fails at its end if one failed.

use std::path::Path;

use hetmem_client::{Key, Stat, Store, StoreError};
use serde_json::{Value, json};

use crate::commands::{all_under, connect};
use crate::failure::Failure;
use crate::output::{Align, Output, Table, bytes, yes};

#[derive(Debug, clap::Args)]
pub(crate) struct LsArgs {
    /// Keys that start with this [default: all]
    #[arg(default_value = "", hide_default_value = true)]
    prefix: String,
    /// Also tier, dtype, shape and checksum of each, which asks for each
    #[arg(short, long)]
    long: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StatArgs {
    /// The object's key
    key: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct KeysArgs {
    /// The objects' keys
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<String>,
    /// Take each KEY as a prefix: all objects under KEY/
    #[arg(short, long)]
    recursive: bool,
}

pub(crate) fn ls(args: &LsArgs, socket: Option<&Path>, out: Output) -> Result<(), Failure> {
    let store = connect(socket)?;
    let mut rows = Vec::new();
    for listed in store.list(&args.prefix) {
        let listed = listed?;
        let stat = match args.long {
            true => Some(store.stat(&listed.key)?),
            false => None,
        };
        rows.push((listed, stat));
    }
    let json = || {
        let row = |(listed, stat): &(hetmem_client::Listed, Option<Stat>)| match stat {
            Some(stat) => stat_json(&listed.key, stat),
            None => json!({"key": listed.key, "bytes": listed.len_bytes, "holders": listed.holders}),
        };
        rows.iter().map(row).collect::<Value>()
    };
    out.print(json, |text| {
        let mut columns = vec![("bytes", Align::Right), ("key", Align::Left), ("nodes", Align::Left)];
        if args.long {
            columns.extend([
                ("tier here", Align::Left),
                ("dtype", Align::Left),
                ("shape", Align::Left),
                ("checksum", Align::Left),
            ]);
        }
        let mut table = Table::new(&columns);
        for (listed, stat) in &rows {
            let mut cells = vec![bytes(listed.len_bytes), listed.key.to_string(), listed.holders.join(",")];
            if let Some(stat) = stat {
                let tier = stat.tier.map_or("not here".to_owned(), |tier| tier.to_string());
                let shape = format!("{:?}", stat.meta.shape);
                cells.extend([tier, stat.meta.dtype.to_string(), shape, checksum(stat)]);
            }
            table.row(cells);
        }
        if !rows.is_empty() {
            table.write(text)?;
        }
        let total = rows.iter().map(|(listed, _)| listed.len_bytes).sum();
        writeln!(text, "{} objects, {}", rows.len(), bytes(total))
    })?;
    Ok(())
}

pub(crate) fn stat(args: &StatArgs, socket: Option<&Path>, out: Output) -> Result<(), Failure> {
    let key = Key::new(&args.key)?;
    let stat = connect(socket)?.stat(&key)?;
    out.print(
        || stat_json(&key, &stat),
        |text| {
            for (name, value) in [
                ("key", key.to_string()),
                ("dtype", stat.meta.dtype.to_string()),
                ("shape", format!("{:?}", stat.meta.shape)),
                ("bytes", stat.meta.len_bytes.to_string()),
                ("checksum", checksum(&stat)),
                ("tier here", stat.tier.map_or("not here".to_owned(), |tier| tier.to_string())),
                ("pinned here", yes(stat.pinned).to_owned()),
                ("nodes", stat.holders.join(", ")),
            ] {
                writeln!(text, "{name:<12} {value}")?;
            }
            Ok(())
        },
    )?;
    Ok(())
}

fn checksum(stat: &Stat) -> String {
    match stat.meta.checksum.algorithm() {
        0 => "none".to_owned(),
        _ => format!("xxh3-blocks:{:016x}", stat.meta.checksum.value()),
    }
}

fn stat_json(key: &Key, stat: &Stat) -> Value {
    json!({
        "key": key,
        "dtype": stat.meta.dtype.name(),
        "shape": stat.meta.shape.dims(),
        "bytes": stat.meta.len_bytes,
        "checksum": checksum(stat),
        "tier": stat.tier.map(|tier| tier.to_string()),
        "pinned": stat.pinned,
        "holders": stat.holders,
    })
}

pub(crate) fn rm(args: &KeysArgs, socket: Option<&Path>, out: Output) -> Result<(), Failure> {
    let store = connect(socket)?;
    each(args, &store, "deleted", out, |key| match store.delete(key)? {
        true => Ok(()),
        false => Err(StoreError::not_found("rm", key)),
    })
}

pub(crate) fn pin(args: &KeysArgs, pin: bool, socket: Option<&Path>, out: Output) -> Result<(), Failure> {
    let store = connect(socket)?;
    let what = if pin { "pinned" } else { "unpinned" };
    each(args, &store, what, out, |key| store.pin(key, pin))
}

/// Does something with each key; the first failure is the command's.
fn each(
    args: &KeysArgs,
    store: &Store,
    what: &str,
    out: Output,
    act: impl Fn(&Key) -> Result<(), StoreError>,
) -> Result<(), Failure> {
    let mut done = Vec::new();
    let mut failed = Vec::new();
    for key in keys_of(args, store)? {
        match act(&key) {
            Ok(()) => done.push(key),
            Err(error) => failed.push((key, error)),
        }
    }
    out.print(
        || {
            let failed = failed.iter().map(|(key, error)| json!({"key": key, "error": error.to_string()}));
            json!({what: done, "failed": failed.collect::<Value>()})
        },
        |text| {
            writeln!(text, "{} {what}", done.len())?;
            // The first one is said by the command's own failure.
            for (_, error) in failed.iter().skip(1) {
                writeln!(text, "{error}")?;
            }
            Ok(())
        },
    )?;
    match failed.into_iter().next() {
        Some((_, error)) => Err(error.into()),
        None => Ok(()),
    }
}

fn keys_of(args: &KeysArgs, store: &Store) -> Result<Vec<Key>, StoreError> {
    let mut keys = Vec::new();
    for name in &args.keys {
        if !args.recursive {
            keys.push(Key::new(name)?);
            continue;
        }
        let before = keys.len();
        for listed in store.list(&all_under(name)) {
            keys.push(listed?.key);
        }
        if keys.len() == before {
            return Err(StoreError::not_found("list", all_under(name)));
        }
    }
    Ok(keys)
}
