//! The threads that run kernels: persistent, spinning briefly, then parked.
//!
//! A parallel region is a number of tasks. Threads claim them one by one, the caller among them, so a worker that the
//! system has put aside delays nobody: whoever is awake does the work, and the caller waits only for tasks that were
//! claimed. Which thread runs a task never changes a result.

#![allow(unsafe_code)]

use std::hint;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};

/// How many times a waiting thread looks again before it sleeps: some tens of microseconds.
const SPINS: u32 = 4_000;

/// A fixed set of threads. One region runs at a time; the owner is the only caller.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

struct Worker {
    handle: Option<JoinHandle<()>>,
    thread: Thread,
}

/// What the threads see. One word holds the region's number, its task count and the next unclaimed task, so a claim
/// succeeds only against the region it was read for.
struct Shared {
    ticket: AtomicU64,
    call: AtomicPtr<()>,
    data: AtomicPtr<()>,
    num_done: AtomicU32,
    num_parked: AtomicUsize,
    stopping: AtomicBool,
}

type Call = unsafe fn(data: *const (), task: usize, thread: usize);

/// The most tasks a region can have.
pub(super) const MAX_TASKS: usize = u16::MAX as usize;

/// `[region: 32][num_tasks: 16][next task: 16]`.
#[derive(Clone, Copy)]
struct Ticket(u64);

impl Ticket {
    fn first_of_next_region(self, num_tasks: u16) -> Self {
        let region = ((self.0 >> 32) as u32).wrapping_add(1);
        Ticket(u64::from(region) << 32 | u64::from(num_tasks) << 16)
    }

    /// The task to claim, if the region has one left.
    fn task(self) -> Option<usize> {
        let (num_tasks, next) = ((self.0 >> 16) as u16, self.0 as u16);
        (next < num_tasks).then_some(next as usize)
    }
}

impl ThreadPool {
    /// Starts `num_threads - 1` workers; the caller of [`run`](Self::run) is the remaining one.
    pub fn new(num_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            call: AtomicPtr::new(std::ptr::null_mut()),
            data: AtomicPtr::new(std::ptr::null_mut()),
            num_done: AtomicU32::new(0),
            num_parked: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
        });
        let workers = (1..num_threads.max(1)).filter_map(|index| start_worker(&shared, index)).collect();
        Self { shared, workers }
    }

    /// Threads that take part in a region, the caller included.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(index, thread)` for every index in `[0, num_tasks)` and returns when all are done. `thread` is in
    /// `[0, num_threads)` and is held by one running task at a time, so it can index scratch space.
    pub fn run<F: Fn(usize, usize) + Sync>(&mut self, num_tasks: usize, task: F) {
        if num_tasks <= 1 || self.workers.is_empty() {
            (0..num_tasks).for_each(|index| task(index, 0));
            return;
        }
        assert!(num_tasks <= MAX_TASKS, "a region has at most {MAX_TASKS} tasks, not {num_tasks}");
        self.shared.publish(&task, num_tasks as u16);
        if self.shared.num_parked.load(Ordering::SeqCst) > 0 {
            self.workers.iter().for_each(|worker| worker.thread.unpark());
        }
        self.shared.work(0);
        let mut spins = 0u32;
        while (self.shared.num_done.load(Ordering::Acquire) as usize) < num_tasks {
            spins += 1;
            if spins.is_multiple_of(SPINS) { thread::yield_now() } else { hint::spin_loop() }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for worker in &mut self.workers {
            worker.thread.unpark();
            if let Some(handle) = worker.handle.take() {
                let _ = handle.join();
            }
        }
    }
}

impl Shared {
    fn publish<F: Fn(usize, usize) + Sync>(&self, task: &F, num_tasks: u16) {
        let ticket = Ticket(self.ticket.load(Ordering::Relaxed)).first_of_next_region(num_tasks);
        let call: Call = call_task::<F>;
        // Every task of the old region is done, so no ticket of it can be claimed while these change.
        self.num_done.store(0, Ordering::Relaxed);
        self.call.store(call as *mut (), Ordering::Relaxed);
        self.data.store(std::ptr::from_ref(task).cast::<()>().cast_mut(), Ordering::Relaxed);
        self.ticket.store(ticket.0, Ordering::SeqCst);
    }

    /// Claims and runs tasks until none is left.
    fn work(&self, thread: usize) {
        while let Some((call, data, task)) = self.claim() {
            // SAFETY: the claim succeeded, so `call` and `data` belong to the region that is running, whose closure
            // lives until all its tasks, this one included, are counted in `num_done`.
            unsafe { call(data, task, thread) };
            self.num_done.fetch_add(1, Ordering::Release);
        }
    }

    fn claim(&self) -> Option<(Call, *const (), usize)> {
        let mut ticket = Ticket(self.ticket.load(Ordering::Acquire));
        loop {
            let task = ticket.task()?;
            let (call, data) = (self.call.load(Ordering::Relaxed), self.data.load(Ordering::Relaxed));
            match self.ticket.compare_exchange_weak(ticket.0, ticket.0 + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: `call` was stored from a `Call` before the ticket of this region, and the exchange
                    // proves that no later region had begun when it was read.
                    let call = unsafe { std::mem::transmute::<*mut (), Call>(call) };
                    return Some((call, data, task));
                }
                Err(seen) => ticket = Ticket(seen),
            }
        }
    }

    fn has_work(&self) -> bool {
        Ticket(self.ticket.load(Ordering::SeqCst)).task().is_some()
    }

    fn serve(&self, thread: usize) {
        while !self.stopping.load(Ordering::SeqCst) {
            self.work(thread);
            if !self.spin() {
                self.park();
            }
        }
    }

    fn spin(&self) -> bool {
        (0..SPINS).any(|_| {
            hint::spin_loop();
            self.has_work()
        })
    }

    fn park(&self) {
        self.num_parked.fetch_add(1, Ordering::SeqCst);
        // A region published before this load is seen here; one published after it sees `num_parked` and unparks.
        if !self.has_work() && !self.stopping.load(Ordering::SeqCst) {
            thread::park();
        }
        self.num_parked.fetch_sub(1, Ordering::SeqCst);
    }
}

fn start_worker(shared: &Arc<Shared>, index: usize) -> Option<Worker> {
    let shared = Arc::clone(shared);
    let builder = thread::Builder::new().name(format!("mneme-compute-{index}"));
    let handle = builder.spawn(move || shared.serve(index)).ok()?;
    Some(Worker { thread: handle.thread().clone(), handle: Some(handle) })
}

/// # Safety
/// `data` points to a live `F`.
unsafe fn call_task<F: Fn(usize, usize) + Sync>(data: *const (), task: usize, thread: usize) {
    // SAFETY: the caller's promise.
    let function = unsafe { &*data.cast::<F>() };
    function(task, thread);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_over_many_regions() {
        let mut pool = ThreadPool::new(4);
        for num_tasks in (0..2_000).map(|round| round % 37) {
            let counts: Vec<AtomicU32> = (0..num_tasks).map(|_| AtomicU32::new(0)).collect();
            pool.run(num_tasks, |task, thread| {
                assert!(thread < 4);
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_parked_pool_wakes_up() {
        let mut pool = ThreadPool::new(2);
        while pool.shared.num_parked.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        let sum = AtomicU32::new(0);
        pool.run(100, |task, _| {
            sum.fetch_add(task as u32, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
    }
}
