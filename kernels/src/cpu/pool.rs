//! A persistent pool of threads for loops of microseconds.
//!
//! [`Pool::run`] opens a job, works on it itself, closes it and waits for the workers that joined in between. A worker
//! that the scheduler has not let run has not joined and is not waited for: on a busy machine the caller does the work
//! alone instead of waiting. Workers spin for some tens of microseconds after a job and then sleep, so an idle pool
//! costs nothing and an oversubscribed machine never spins for long. A run allocates nothing.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::hint::spin_loop;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle, yield_now};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps: longer than the serial parts between the products of one layer, far
/// shorter than a scheduler's time slice. All the while it yields to whoever else wants its core.
const IDLE: Duration = Duration::from_micros(50);

/// How long a caller spins for workers that are at their last task: longer than such tasks are, unless the worker has
/// lost its core, perhaps to this very caller.
const LAST: Duration = Duration::from_micros(10);

/// A fixed set of threads that share the tasks of one loop at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// `Fn(task, thread)`: what a job does.
type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Shared {
    /// Epoch of the job in the upper half, then [`OPEN`], [`STOP`], [`WAITING`], and the number of workers in the job.
    state: AtomicU64,
    /// The task to claim next.
    next: AtomicUsize,
    /// Written only while the job is closed and no worker is in it.
    job: UnsafeCell<Job>,
    /// A caller owns the job.
    running: AtomicBool,
    /// Workers that the system has started.
    started: AtomicUsize,
    /// Workers asleep, or about to be.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    done: Condvar,
    /// The first panic of the job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct Job {
    tasks: usize,
    body: &'static Body<'static>,
}

// SAFETY: `job` is the only part that is not `Sync` by itself. It is written by the one caller that owns `running`,
// while the job is closed and nobody is in it, and read by workers that have joined the open job; joining (acquire)
// follows opening (release), and the next write follows the last worker's leaving (release, acquired by the caller).
unsafe impl Sync for Shared {}

/// Workers may join the job.
const OPEN: u64 = 1 << 31;
/// Workers shall end.
const STOP: u64 = 1 << 30;
/// The caller sleeps until the last worker leaves.
const WAITING: u64 = 1 << 29;

const fn epoch(state: u64) -> u64 {
    state >> 32
}

const fn joined(state: u64) -> u64 {
    state & (WAITING - 1)
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`run`](Self::run) among them: it spawns one less. 0 counts as 1.
    ///
    /// Returns when all of them are there: what the system allocates for a thread is allocated then.
    ///
    /// # Errors
    /// Where the system refuses a thread.
    pub fn new(threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { tasks: 0, body: &|_, _| {} }),
            running: AtomicBool::new(false),
            started: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
            panic: Mutex::new(None),
        });
        // Dropping a pool that is not complete ends the workers it has.
        let mut pool = Self { shared, workers: Vec::new() };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = Builder::new().name(format!("thinkey-{thread}")).spawn(move || shared.work(thread))?;
            pool.workers.push(worker);
        }
        while pool.shared.started.load(Ordering::Acquire) < pool.workers.len() {
            yield_now();
        }
        Ok(pool)
    }

    /// Most bytes of heap that a pool of `threads` threads takes; their stacks come from the system.
    #[must_use]
    pub const fn bytes(threads: usize) -> usize {
        /// What the standard library keeps of a thread: handle, name, packet. Less than this.
        const THREAD: usize = 2048;
        size_of::<Shared>() + threads * THREAD
    }

    /// Threads that work on a run, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(task)` for every task below `tasks`, on this thread and the workers, and returns when all are done.
    /// Tasks are claimed one by one in ascending order.
    ///
    /// A run inside a task of the same pool, or while another thread runs, does its tasks on the calling thread.
    ///
    /// # Panics
    /// With the first panic of a task, after every task that had begun has ended; tasks not begun are dropped. The
    /// pool stays usable.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        self.run_on_threads(tasks, &|task, _| body(task));
    }

    /// [`run`](Self::run) for tasks that may fail: an error of one of them, where there are any. All tasks run.
    ///
    /// # Errors
    /// What a task returned.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn try_run<E: Send>(&self, tasks: usize, body: &(dyn Fn(usize) -> Result<(), E> + Sync)) -> Result<(), E> {
        self.try_run_on_threads(tasks, &|task, _| body(task))
    }

    /// [`run_on_threads`](Self::run_on_threads) for tasks that may fail, as [`try_run`](Self::try_run).
    ///
    /// # Errors
    /// What a task returned.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn try_run_on_threads<E: Send>(
        &self,
        tasks: usize,
        body: &(dyn Fn(usize, usize) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        let failed = Mutex::new(None);
        self.run_on_threads(tasks, &|task, thread| {
            if let Err(error) = body(task, thread) {
                *lock(&failed) = Some(error);
            }
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// [`run`](Self::run) with `body(task, thread)`: `thread` is below [`threads`](Self::threads), and no two tasks of
    /// this run have the same at the same time. It is what per-thread scratch is indexed with.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn run_on_threads(&self, tasks: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        let shared = &*self.shared;
        if self.workers.is_empty() || tasks <= 1 || shared.running.swap(true, Ordering::Acquire) {
            (0..tasks).for_each(|task| body(task, 0));
            return;
        }
        // SAFETY: only the lifetime changes. Workers call `body` between joining and leaving the job, and `finish`
        // below returns when all have left and none can join any more.
        let body = unsafe { std::mem::transmute::<&Body<'_>, &'static Body<'static>>(body) };
        shared.open(Job { tasks, body });
        shared.claim(Job { tasks, body }, 0);
        shared.finish();
        let panic = lock(&shared.panic).take();
        shared.running.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.fetch_or(STOP, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so it cannot have ended with one.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Shared {
    /// Publishes `job` and wakes as many sleepers as it can use.
    fn open(&self, job: Job) {
        // SAFETY: the caller owns `running`, and the last job was closed and left by all.
        unsafe { *self.job.get() = job };
        self.next.store(0, Ordering::Relaxed);
        let epoch = epoch(self.state.load(Ordering::Relaxed)).wrapping_add(1);
        // Sequentially consistent with the load below, as their mirror images in `sleep` are: a worker that goes to
        // sleep either is seen here or sees the job.
        self.state.store(epoch << 32 | OPEN, Ordering::SeqCst);
        let sleepers = self.sleepers.load(Ordering::SeqCst);
        if sleepers > 0 {
            drop(lock(&self.sleep));
            for _ in 0..sleepers.min(job.tasks - 1) {
                self.wake.notify_one();
            }
        }
    }

    /// Does tasks of `job` until none is left.
    fn claim(&self, job: Job, thread: usize) {
        let work = || {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                (job.body)(task, thread);
            }
        };
        // Unwind safety: the panic is handed to the caller, who sees whatever the tasks left, as after a plain loop.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            self.next.fetch_max(job.tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }

    /// Closes the job and waits until every worker has left it.
    fn finish(&self) {
        if joined(self.state.fetch_and(!OPEN, Ordering::AcqRel)) == 0 {
            return;
        }
        let mut spin = Spin::new(LAST);
        while joined(self.state.load(Ordering::Acquire)) > 0 {
            if spin.again().is_none() {
                self.state.fetch_or(WAITING, Ordering::AcqRel);
                let mut guard = lock(&self.sleep);
                // Looked at under the lock, which the last worker takes before it notifies.
                while joined(self.state.load(Ordering::Acquire)) > 0 {
                    guard = self.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                return;
            }
        }
    }

    /// The life of a worker.
    fn work(&self, thread: usize) {
        self.started.fetch_add(1, Ordering::Release);
        let mut seen = 0;
        let mut spin = Spin::new(IDLE);
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state & STOP != 0 {
                return;
            }
            if epoch(state) == seen {
                match spin.again() {
                    Some(0) => yield_now(),
                    Some(_) => {}
                    None => {
                        self.sleep(seen);
                        spin = Spin::new(IDLE);
                    }
                }
                continue;
            }
            if state & OPEN == 0 {
                seen = epoch(state);
            } else if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                seen = epoch(state);
                // SAFETY: this worker is in the open job, so nobody writes it.
                let job = unsafe { *self.job.get() };
                self.claim(job, thread);
                let state = self.state.fetch_sub(1, Ordering::AcqRel);
                if joined(state) == 1 && state & WAITING != 0 {
                    drop(lock(&self.sleep));
                    self.done.notify_one();
                }
                spin = Spin::new(IDLE);
            }
        }
    }

    /// Sleeps until there is another job than `seen`, or the end.
    fn sleep(&self, seen: u64) {
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if epoch(state) != seen || state & STOP != 0 {
                break;
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Locks; nothing that panics runs under these locks, so poison has no meaning.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Busy waiting for a limited time.
struct Spin {
    limit: Duration,
    rounds: u32,
    since: Option<Instant>,
}

impl Spin {
    /// Pauses between looks at the clock.
    const ROUNDS: u32 = 32;

    const fn new(limit: Duration) -> Self {
        Self { limit, rounds: 0, since: None }
    }

    /// Pauses; returns the pauses since the last look at the clock, or nothing when the time is over.
    fn again(&mut self) -> Option<u32> {
        spin_loop();
        self.rounds = (self.rounds + 1) % Self::ROUNDS;
        let over = self.rounds == 0 && self.since.get_or_insert_with(Instant::now).elapsed() >= self.limit;
        (!over).then_some(self.rounds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::thread::sleep;

    #[test]
    fn every_task_runs_once_whatever_the_counts() {
        for threads in [0, 1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                let busy: Vec<AtomicBool> = (0..pool.threads()).map(|_| AtomicBool::new(false)).collect();
                pool.run_on_threads(tasks, &|task, thread| {
                    assert!(!busy[thread].swap(true, Ordering::Relaxed), "two tasks on thread {thread}");
                    counts[task].fetch_add(1, Ordering::Relaxed);
                    busy[thread].store(false, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn thousands_of_runs_with_and_without_sleep_lose_nothing() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        for round in 0..20_000 {
            pool.run(5, &|task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.swap(0, Ordering::Relaxed), 10, "round {round}");
            if round % 2_000 == 0 {
                sleep(4 * IDLE);
            }
        }
    }

    #[test]
    fn workers_share_the_work() {
        let pool = Pool::new(2).unwrap();
        let by = [AtomicU32::new(0), AtomicU32::new(0)];
        // Waiting tasks take no processor, so the worker gets its share on a machine with one core too.
        pool.run_on_threads(20, &|_, thread| {
            by[thread].fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(2));
        });
        assert!(by.iter().all(|n| n.load(Ordering::Relaxed) > 0), "{by:?}");
    }

    #[test]
    fn the_caller_waits_for_a_worker_that_is_still_busy() {
        let pool = Pool::new(2).unwrap();
        for wait in [Duration::ZERO, LAST / 2, 100 * LAST] {
            let ended = AtomicU32::new(0);
            pool.run_on_threads(2, &|_, thread| {
                if thread == 1 {
                    sleep(wait);
                } else {
                    sleep(Duration::from_micros(200));
                }
                ended.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ended.load(Ordering::Relaxed), 2);
        }
    }

    #[test]
    fn no_wakeup_is_lost_when_the_last_worker_leaves_as_the_caller_goes_to_sleep() {
        let pool = Pool::new(2).unwrap();
        for round in 0..8_000 {
            let until = LAST + Duration::from_nanos(round % 100 * 100);
            pool.run_on_threads(2, &|_, thread| {
                let start = Instant::now();
                while thread == 1 && start.elapsed() < until {
                    spin_loop();
                }
                // Leaves the other task to the worker, if it is there.
                while thread == 0 && start.elapsed() < Duration::from_micros(2) {
                    spin_loop();
                }
            });
        }
    }

    #[test]
    fn a_run_inside_a_task_and_beside_another_run_completes() {
        let pool = Pool::new(2).unwrap();
        let count = AtomicU32::new(0);
        let nested = || pool.run(4, &|_| pool.run(8, &|_| _ = count.fetch_add(1, Ordering::Relaxed)));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(nested);
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 3 * 4 * 8);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_stays_usable() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads).unwrap();
            for bad in [0, 3, 7] {
                let panic = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(8, &|task| {
                        sleep(Duration::from_micros(100));
                        assert!(task != bad, "task {task}");
                    });
                }));
                assert_eq!(panic.unwrap_err().downcast_ref::<String>(), Some(&format!("task {bad}")));
                let count = AtomicU32::new(0);
                pool.run(8, &|_| _ = count.fetch_add(1, Ordering::Relaxed));
                assert_eq!(count.load(Ordering::Relaxed), 8);
            }
        }
    }

    #[test]
    fn dropping_ends_sleeping_and_spinning_workers() {
        for pause in [Duration::ZERO, 4 * IDLE] {
            let pool = Pool::new(3).unwrap();
            pool.run(6, &|_| {});
            sleep(pause);
            drop(pool);
        }
    }
}
