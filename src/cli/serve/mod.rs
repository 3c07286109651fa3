//! Serves a volume: `nbdmirror serve`.
//!
//! ```text
//!  paths, TLS files ─► open, lock, read ─► (plan creation) ─► assemble ─► bind sockets ─► (create) ─► engine ─► control
//!  └────────────────────── refusals: nothing has been written ─────────────────────────┘
//! ```
//!
//! What must hold: every refusal comes before the first byte is written to a replica.

mod access;
mod sockets;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use crate::cli::creation::{Plan, Wish};
use crate::cli::open::{Opened, absolute, device_failure, distinct_paths, open, open_for_add};
use crate::cli::replicas::{Gathered, gather, require_all};
use crate::cli::size::{exact, parse_region_size, parse_size};
use crate::cli::target::volume_name;
use crate::cli::{Outcome, banner, print};
use crate::control::activation::{inherited_listeners, notify};
use crate::control::failure::Failure;
use crate::control::listen::{ListenAddress, Listener};
use crate::control::tls::Tls;
use crate::control::{self, ControlConfig};
use crate::engine::availability::check_io_uring;
use crate::engine::device::{self, ReplicaDevice};
use crate::engine::{EngineConfig, EngineHandle, EngineStatus, MEMORY_BYTES_MAX_DEFAULT};
use crate::format::Assembly;
use crate::format::assemble::{AssembleOptions, assemble};
use crate::mirror::MirrorConfig;
use crate::nbd::export::Export;
use crate::units::{REPLICAS_MAX, ReplicaSet, ReplicaSlot, SECOND_NS};
use access::Access;
use sockets::Sockets;

const INTENT_IDLE_NS: u64 = 5 * SECOND_NS;
const RESYNC_JOBS_MAX: usize = 4;
const RESYNC_BURST_NS: u64 = 16 * (SECOND_NS / 1000);

/// Must be `yes` where `--bench-no-intent` is given.
const BENCH_VARIABLE: &str = "NBDMIRROR_BENCH_UNSAFE";

/// To record that the volume is open takes two small durable writes on each replica.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
const OPEN_POLL: Duration = Duration::from_millis(1);

const AFTER_HELP: &str = "\
Examples:
  nbdmirror serve --create 1G disk-a.img disk-b.img     make a mirror if there is none, and serve it
  nbdmirror serve /dev/sdb /dev/sdc                     on a Unix socket, for this machine
  nbdmirror serve --listen 127.0.0.1:10809 --listen unix:/run/vol.sock a.img b.img
  nbdmirror serve --degraded a.img                      the other replica is gone for now
  nbdmirror serve --listen 0.0.0.0:10809 --allow 192.0.2.0/24 --tls require \\
                  --tls-cert cert.pem --tls-key key.pem /dev/sdb /dev/sdc

Without --listen, clients connect to a Unix socket named after the volume in /run/nbdmirror (as root) or
$XDG_RUNTIME_DIR/nbdmirror; under systemd's socket activation, to the sockets of the .socket unit. SIGTERM and
SIGINT stop the volume cleanly (exit code 0); a second one ends at once (130). SIGHUP reads the TLS files again.
Log to standard error: -v, -vv, or $RUST_LOG.";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Serve {
    /// Make a volume of this size first if the replicas hold none yet.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    create: Option<u64>,
    /// With --create: unit of dirty tracking and resync, a power of two from 64K to 64M.
    #[arg(long, value_name = "SIZE", value_parser = parse_region_size, requires = "create")]
    region_size: Option<u64>,
    /// Where clients connect: unix:PATH or ADDR:PORT (may be given several times).
    #[arg(long, value_name = "WHERE")]
    listen: Vec<ListenAddress>,
    /// Name of the volume, from now on: it is recorded on the replicas.
    #[arg(long, value_parser = volume_name)]
    name: Option<String>,
    /// Start although replicas are missing.
    #[arg(long)]
    degraded: bool,
    /// Serve for reading only, and write nothing to the replicas.
    #[arg(long)]
    read_only: bool,
    /// Read this replica only when nothing else can answer (may be given several times).
    #[arg(long, value_name = "REPLICA")]
    write_mostly: Vec<PathBuf>,
    /// Path of the control socket [default: beside the default NBD socket].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Start from a stale replica alone: gives up writes that only the missing ones have.
    #[arg(long)]
    force: bool,
    /// Memory for the data of requests in flight, at least 96M; some MiB for the rest stand beside it [default: 256M].
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_size,
        default_value_t = MEMORY_BYTES_MAX_DEFAULT, hide_default_value = true)]
    memory: u64,
    #[command(flatten)]
    access: Access,
    /// For benchmarks of a new, throw-away volume: no write-intent bitmap.
    #[arg(long, hide = true, requires = "create")]
    bench_no_intent: bool,
    /// Log more (-vv: everything).
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Files or block devices, one to eight.
    #[arg(required = true)]
    replica: Vec<PathBuf>,
}

const _: () = assert!(MEMORY_BYTES_MAX_DEFAULT >= MEMORY_BYTES_MIN);
/// Enough for two of the largest requests at once.
const MEMORY_BYTES_MIN: u64 = 96 << 20;

fn parse_memory_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).map_err(|error| error.to_string())?;
    if bytes < MEMORY_BYTES_MIN {
        return Err(format!("too little memory; give {} or more", exact(MEMORY_BYTES_MIN)));
    }
    Ok(bytes)
}

impl Serve {
    pub(super) fn run(self) -> Outcome {
        // Before any thread starts, the log's too.
        control::block_signals()?;
        let inherited = inherited_listeners()?;
        log_to_stderr(self.verbose);
        check_io_uring().map_err(|error| Failure::new(error.to_string()))?;
        raise_descriptor_limit();
        if self.create.is_some() && self.read_only {
            return Err(Failure::new("--create and --read-only exclude each other").hint("create it first"));
        }
        self.check_bench()?;
        let tls = self.access.tls()?;
        let paths = distinct_paths(&self.replica)?;
        let write_mostly = self.write_mostly_paths(&paths)?;
        let opened = self.open(&paths)?;
        match self.creation(opened)? {
            Creation::Planned(plan) => {
                let sockets = self.bind(&plan.name, inherited)?;
                let described = plan.describe();
                plan.carry_out()?;
                print(&described)?;
                let gathered = require_all(self.open(&paths)?)?;
                let assembly = self.assemble(&gathered)?;
                self.start(gathered, assembly, sockets, tls, &write_mostly)
            }
            Creation::NotWanted(_) if self.bench_no_intent => {
                Err(Failure::new("--bench-no-intent: the replicas hold a volume already")
                    .hint("it is for a volume that the same command makes, and that is thrown away after"))
            }
            Creation::NotWanted(opened) => {
                let gathered = gather(opened, self.degraded)?;
                let assembly = self.assemble(&gathered)?;
                let sockets = self.bind(&assembly.head.name, inherited)?;
                self.start(gathered, assembly, sockets, tls, &write_mostly)
            }
        }
    }

    /// Refuses the benchmark switch unless it is meant, and says loudly what it gives away.
    fn check_bench(&self) -> Outcome {
        if !self.bench_no_intent {
            return Ok(());
        }
        if std::env::var_os(BENCH_VARIABLE).is_none_or(|value| value != "yes") {
            return Err(Failure::new("--bench-no-intent gives up the safety of the data").hint(format!(
                "it is for benchmarks; if nothing on the volume matters: {BENCH_VARIABLE}=yes"
            )));
        }
        tracing::warn!(
            "BENCHMARK: no write-intent bitmap. After a crash or the failure of a replica THE REPLICAS DIFFER \
             and nobody knows where. Delete this volume when the benchmark is done"
        );
        Ok(())
    }

    /// The paths of `--write-mostly`, each of which must be one of the replicas.
    fn write_mostly_paths(&self, replicas: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
        let same = |one: &PathBuf, other: &PathBuf| {
            one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(a), Ok(b)) if a == b)
        };
        let find = |wanted: &PathBuf| {
            let path = absolute(wanted)?;
            replicas.iter().find(|replica| same(replica, &path)).cloned().ok_or_else(|| {
                Failure::new(format!("--write-mostly {} is none of the replicas", wanted.display()))
                    .hint("name it as you name the replica, and name it there too")
            })
        };
        self.write_mostly.iter().map(find).collect()
    }

    fn open(&self, paths: &[PathBuf]) -> Result<Vec<Opened>, Failure> {
        let access = if self.read_only { device::Access::ReadOnly } else { device::Access::ReadWrite };
        paths.iter().map(|path| open(path, access).map_err(device_failure)).collect()
    }

    /// Whether a volume is to be made first, and if so, a plan that has been checked.
    fn creation(&self, opened: Vec<Opened>) -> Result<Creation, Failure> {
        let Some(size_bytes) = self.create else { return Ok(Creation::NotWanted(opened)) };
        let is_new = |replica: &Opened| matches!(replica.content, Ok(None));
        let Some(holder) = opened.iter().find(|replica| !is_new(replica)) else {
            let wish = Wish {
                size_bytes: Some(size_bytes),
                region_bytes: self.region_size,
                name: self.name.clone(),
                assume_clean: false,
                force: false,
            };
            return Plan::new(wish, opened).map(Creation::Planned);
        };
        if let Some(new) = opened.iter().find(|replica| is_new(replica)).filter(|_| !self.degraded) {
            return Err(Failure::new(format!(
                "{} holds a volume and {} does not",
                holder.path_text(),
                new.path_text()
            ))
            .hint(format!(
                "serve the volume without --create and with --degraded, then take {} in with `nbdmirror add`",
                new.path_text()
            )));
        }
        Ok(Creation::NotWanted(opened))
    }

    fn assemble(&self, gathered: &Gathered) -> Result<Assembly, Failure> {
        let options =
            AssembleOptions { degraded: self.degraded, force: self.force, read_only: self.read_only };
        let mut assembly =
            assemble(&gathered.found, options).map_err(|error| Failure::new(error.to_string()))?;
        // The core reports the assembly's warnings as its first notices.
        let volume_bytes = assembly.head.regions.volume_bytes;
        if let Some(wanted) = self.create.filter(|wanted| *wanted != volume_bytes) {
            let (wanted, there) = (exact(wanted), exact(volume_bytes));
            tracing::warn!("the replicas hold a volume of {there} already: --create {wanted} has no effect");
        }
        if let Some(name) = &self.name {
            assembly.head.name.clone_from(name);
        }
        // Paths change (`/dev/sdb` is another disk after a boot): operators name a replica as it is named now.
        for (member, index) in assembly.head.members.iter_mut().zip(assembly.found_of_slot) {
            if let (Some(member), Some(index)) = (member, index) {
                member.path.clone_from(&gathered.found[index].path);
            }
        }
        Ok(assembly)
    }

    /// Starts the volume and serves it to its end.
    fn start(
        &self,
        gathered: Gathered,
        assembly: Assembly,
        sockets: Sockets,
        tls: Option<(Arc<Tls>, bool)>,
        write_mostly: &[PathBuf],
    ) -> Outcome {
        let export = Arc::new(Export {
            name: assembly.head.name.clone(),
            description: "a volume mirrored by nbdmirror".to_owned(),
            size_bytes: assembly.head.regions.volume_bytes,
            read_only: self.read_only,
            replicas: assembly.head.members().map(|(slot, _)| slot).collect(),
        });
        let (devices, write_mostly) = seat(gathered, &assembly, write_mostly);
        let mirror = MirrorConfig {
            read_only: self.read_only,
            write_mostly,
            traits: [None; REPLICAS_MAX],
            entropy: entropy(),
            wall_clock_origin_ns: wall_clock_ns(),
            intent_idle_ns: INTENT_IDLE_NS,
            resync_jobs_max: RESYNC_JOBS_MAX,
            resync_burst_ns: RESYNC_BURST_NS,
            without_intent: self.bench_no_intent,
        };
        let config = EngineConfig {
            mirror,
            assembly,
            devices,
            memory_bytes_max: self.memory,
            client_idle_ns_max: self.access.idle_ns_max(),
        };
        let engine = crate::engine::start(config).map_err(|error| Failure::new(error.to_string()))?;
        let status = wait_until_open(&engine.handle)?;
        let secure = self.access.requires_tls();
        let places: Vec<_> = sockets.listeners.iter().map(Listener::place).collect();
        let listen_uris = places.iter().map(|place| banner::uri(place, &export.name, secure)).collect();
        // What is said of the start stands before it.
        control::log::flush();
        print(&banner::banner(&status, &places, sockets.control.path(), secure))?;
        notify("READY=1");
        let report = control::run(ControlConfig {
            listeners: sockets.listeners,
            listen_uris,
            control: sockets.control,
            export,
            engine: engine.handle.clone(),
            open_replica: open_for_add,
            allow: self.access.allow_list(),
            connections_max: self.access.connections_max(),
            tls,
        })?;
        engine.join().map_err(|error| Failure::new(error.to_string()))?;
        if !report.clean {
            return Err(Failure::new(format!(
                "stopped, but the volume could not be marked clean: {}",
                report.message
            ))
            .hint("the log says why; the next start resyncs the regions concerned"));
        }
        print("Stopped, clean.\n")
    }
}

/// The status as soon as requests and commands are taken; or as it is, where that takes too long.
fn wait_until_open(engine: &EngineHandle) -> Result<EngineStatus, Failure> {
    let began = Instant::now();
    loop {
        let status = engine.status().blocking_recv().map_err(|_| {
            Failure::new("the engine ended as soon as it was started").hint("the log says why")
        })?;
        if status.open {
            return Ok(status);
        }
        if began.elapsed() > OPEN_TIMEOUT {
            tracing::warn!(
                "the replicas take long to record that the volume is open; clients wait until then"
            );
            return Ok(status);
        }
        std::thread::sleep(OPEN_POLL);
    }
}

enum Creation {
    Planned(Plan),
    NotWanted(Vec<Opened>),
}

/// Puts each device into its slot, and finds the slots to read last.
fn seat(
    gathered: Gathered,
    assembly: &Assembly,
    write_mostly: &[PathBuf],
) -> ([Option<ReplicaDevice>; REPLICAS_MAX], ReplicaSet) {
    let mut by_index: Vec<Option<ReplicaDevice>> = gathered.devices.into_iter().map(Some).collect();
    let mut devices = [const { None }; REPLICAS_MAX];
    let mut read_last = ReplicaSet::EMPTY;
    for slot in ReplicaSlot::all() {
        let Some(index) = assembly.found_of_slot[slot.index()] else { continue };
        let device = by_index[index].take();
        if device.as_ref().is_some_and(|device| write_mostly.contains(&device.path)) {
            read_last.insert(slot);
        }
        devices[slot.index()] = device;
    }
    (devices, read_last)
}

fn entropy() -> u128 {
    // A random UUID has six fixed bits, never at the same place in both.
    Uuid::new_v4().as_u128() ^ Uuid::new_v4().as_u128().rotate_left(37)
}

fn wall_clock_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn log_to_stderr(verbose: u8) {
    let default = match verbose {
        0 => "warn,nbdmirror=info",
        1 => "info,nbdmirror=debug",
        _ => "trace",
    };
    let filter = if std::env::var_os("RUST_LOG").is_some() && verbose == 0 {
        EnvFilter::from_default_env()
    } else {
        EnvFilter::new(default)
    };
    control::log::to_stderr(filter);
}

/// Each client is a descriptor, and the usual soft limit of 1024 is a relic of `select`.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard));
    if let Err(errno) = raised {
        tracing::debug!("cannot raise the limit of open files: {errno}");
    }
}
