/*
 * The usual slice of a dispatcher, in C: see steady.py for what it is and who may call it.
 *
 * Every function here is one of dispatcher.py's or policy/fair.py's and policy/batch.py's, of the same name, with
 * the same operations on doubles in the same order, so that the two agree to the last bit
 * (tests/sched/test_steady.py compares them). Compile without contraction of floating-point operations.
 *
 * A step has two parts. `usual` only reads; where it finds anything that is not usual it answers 0 and nothing has
 * happened, so Python takes the same step at the same time. Only then `step` writes.
 *
 * All numbers are 64-bit words; times are ns of CLOCK_MONOTONIC. No memory is allocated, nothing is locked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define VERSION 10
#define ONE_CPU 1000000000.0
#define UNIT 1073741824.0                   /* fair.py, _UNIT */
#define REBASE_NS 1099511627776.0
#define UNEXPLAINED_NS 150000
#define READ_ALL_WITHIN_NS 250000000
#define AT_ONCE 32
#define READY 4
#define LAGS_KEPT 32
#define BREATHLESS 9
#define HEARTBEAT_EVERY_NS 20000000
#define NOBODY (-1)
#define RECORD_MIGRATED 1
#define RECORD_WORDS 16
#define STOPS (-1)                          /* a policy that is left alone */

enum level { FREE, RUN, WAIT, DOZE, HELD, LEVELS };

typedef int64_t word;

struct state { word policy, priority, stopped; };

struct entry {                              /* policy/fair.py, Entry: the awake ones, in order of slots */
    double v, start, deadline;
    word weight, served, request_ns;        /* request_ns: of this slice, before its class */
    word mode, vcpu;                        /* vcpu: index in `vcpus` */
    double request, credit, patience;       /* of its latency class */
};

struct vcpu {                               /* dispatcher.py, _Vcpu: all of them, in the order of `_order` */
    /* the same for as long as it is here */
    word *words;                            /* its slot in the shared table */
    const volatile word *phase;             /* of its status page, or NULL */
    const volatile word *progress;          /* or NULL */
    word progress_fd;                       /* to read it from, where it is no word of memory; -1 = none */
    word clock_kind, clock;                 /* 0 none, 1 a clock's id, 2 a descriptor of schedstat */
    word pid, tid, slot, generation, mode;
    /* what changes */
    word charged, rate, level, state, fresh, gone;
    word latency, awake, paused;
    word entry;                             /* index in `entries`, -1 = asleep */
    double lag;                             /* of a sleeper, at `asleep_at`, by the run queue's clock */
    word asleep_at, weight;                 /* of a sleeper */
    word seen;                              /* scratch: a reading of `usual` for `step` */
};

struct calls {                              /* instead of the kernel's, for tests; NULL = the kernel */
    word (*now)(void);
    word (*sleep_until)(word due);          /* 1: interrupted */
    word (*run_ns)(word vcpu);
    word (*set)(word vcpu, word old, word new);      /* states; 0, or the error's number */
};

struct fields {                             /* where things are: indices of words */
    word halt, epoch, heartbeat, timeout, used_slots, first_slot, slot_words, policy[12], policies;
    word leave, beat, seen_epoch, head, cpu_ns, refusals, billed;
    word want, flags, rate, cap, latency, charged, leak, slices, lag, picked;
    word active, active_mask;
};

struct steady {
    word version, size, entry_size, vcpu_size;       /* checked by Python */
    word *words;                            /* the shared table */
    word *block;                            /* of this host CPU in it */
    word *ring;
    word ring_mask, cpu, count, awake_count;
    struct vcpu *vcpus;
    struct entry *entries;
    const struct calls *calls;
    struct fields at;
    struct state states[2 * LEVELS];        /* by state number */
    word state_of[2][LEVELS];               /* [breathing][level] -> state number */
    word sleeping[8];                       /* phases that are sleep, -1 = no more */
    word asked[12];                          /* policy and settings that this state was made for */
    /* the run queue */
    double virtual_ns;
    word weight, current, clock_ns, picked_at_ns, ratelimit_ns;      /* current: index in `entries`, -1 */
    word batches, batch_ns, wait_max_ns, budget_ns, mode;
    word jitter_ns, random;                 /* of the order: policy/fair.py, _draw */
    /* the dispatcher */
    word pick, slice_ns, slice_start, slice_end, slice_previous, slice_progress, slice_flags, slice_breath;
    word slice_edge_late, decision, breathes, breathing, breath_ns, edge, edge_at, early, credit, turn, beat_seen;
    word epoch, earlier_cpu_ns, steps;
    word reads;                             /* scratch: vCPUs that `usual` has read for an unexplained slice, -1 = none */
    word limit;                             /* steps to take at most, 0 = no limit */
    word before;                            /* in: when Python had taken its step, 0 = unknown */
    word now;                               /* out: when Python is to take a step, 0 = `limit` is reached, or a call failed */
    word error;                             /* out: a call failed with this number */
};

static inline word monotonic(const struct steady *g)
{
    struct timespec t;
    if (g->calls)
        return g->calls->now();
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Total run time of a vCPU, -1 where it cannot be read. */
static word run_ns(const struct steady *g, word index)
{
    const struct vcpu *vcpu = &g->vcpus[index];
    struct timespec t;
    char text[96];
    ssize_t length;

    if (g->calls)
        return g->calls->run_ns(index);
    if (vcpu->clock_kind == 1) {
        if (clock_gettime((clockid_t)vcpu->clock, &t) != 0)
            return -1;
        return t.tv_sec * 1000000000LL + t.tv_nsec;
    }
    length = pread((int)vcpu->clock, text, sizeof text - 1, 0);
    if (length <= 0)
        return -1;
    text[length] = 0;
    return strtoll(text, NULL, 10);
}

static word progress_of(const struct vcpu *vcpu)
{
    word count;

    if (vcpu->progress)
        return *vcpu->progress;
    if (vcpu->progress_fd < 0 || read((int)vcpu->progress_fd, &count, sizeof count) != (ssize_t)sizeof count)
        return 0;
    return count;
}

static int asleep_by_page(const struct steady *g, const struct vcpu *vcpu)
{
    word phase = *vcpu->phase;
    for (const word *at = g->sleeping; *at >= 0; at++)
        if (phase == *at)
            return 1;
    return 0;
}

/* ---- what is usual: reads only ---- */

/* Only rates have changed since the epoch that is known: nobody came, went, was paused or got a cap. */
static int only_rates(const struct steady *g)
{
    const struct fields *at = &g->at;
    const word *words = g->words;
    word here = 0, used = words[at->used_slots];

    for (word i = 0; i < at->policies; i++)
        if (words[at->policy[i]] != g->asked[i])
            return 0;
    for (word i = 0; i < g->count; i++) {
        const struct vcpu *vcpu = &g->vcpus[i];
        const word *slot = vcpu->words;
        if (slot[at->want] != g->cpu || slot[at->cap] || slot[at->latency] != vcpu->latency
                || ((slot[at->flags] & at->active_mask) != at->active) != vcpu->paused)
            return 0;
        if (vcpu->entry < 0 && vcpu->lag < 0.0 && slot[at->rate] != vcpu->rate)
            return 0;                       /* its debt wears off at its rate */
    }
    for (word i = 0; i < used; i++)
        here += words[at->first_slot + i * at->slot_words + at->want] == g->cpu;
    return here == g->count;
}

/* One that was not picked is read: it is as it was when it was last looked at. */
static int unchanged(struct steady *g, word index)
{
    struct vcpu *vcpu = &g->vcpus[index];
    word ran = 0;

    vcpu->seen = vcpu->charged;
    if (vcpu->clock_kind) {
        vcpu->seen = run_ns(g, index);
        if (vcpu->seen < 0)
            return 0;
        ran = vcpu->seen - vcpu->charged;
        if (ran < 0)
            ran = 0;
    }
    if (vcpu->paused)
        return ran == 0;
    if (!vcpu->clock_kind)
        return !vcpu->awake;
    if (vcpu->awake)
        return !vcpu->phase || !asleep_by_page(g, vcpu);
    return ran == 0 && vcpu->phase && asleep_by_page(g, vcpu) && vcpu->lag >= 0.0;
}

/* Whoever may have run beside the pick is as it was; where there are many, in turn until the slice is explained. */
static int others_unchanged(struct steady *g, word unexplained)
{
    word most = g->count <= AT_ONCE ? g->count : AT_ONCE, turn = g->count <= AT_ONCE ? -1 : g->turn;

    for (g->reads = 0; g->reads < most; g->reads++) {
        if (g->count > AT_ONCE && unexplained <= UNEXPLAINED_NS + g->decision)
            break;
        turn = (turn + 1) % g->count;
        if (turn == g->pick)
            continue;
        if (!unchanged(g, turn))
            return 0;
        if (g->vcpus[turn].seen > g->vcpus[turn].charged)
            unexplained -= g->vcpus[turn].seen - g->vcpus[turn].charged;
    }
    return 1;
}

static int usual(struct steady *g, word now)
{
    const word *words = g->words;
    struct vcpu *pick = &g->vcpus[g->pick];
    word elapsed = now - g->slice_start, run, credit, turn;

    if (words[g->at.halt] || g->block[g->at.leave])
        return 0;
    if (now < g->slice_end)
        return 1;                           /* an edge alone */
    if (now - g->beat_seen >= HEARTBEAT_EVERY_NS
            && now - words[g->at.heartbeat] > 2 * words[g->at.timeout])
        return 0;
    if (elapsed <= 0)
        return 0;
    pick->seen = run_ns(g, g->pick);
    run = pick->seen - pick->charged;
    if (pick->seen < 0 || run <= 0 || run * 2 < elapsed)
        return 0;
    if (pick->phase && asleep_by_page(g, pick))
        return 0;
    if ((g->virtual_ns + (double)run / (double)g->weight) * (double)g->weight > REBASE_NS - READ_ALL_WITHIN_NS * 4.0)
        return 0;                           /* Python rebases, within a second of service */
    if (words[g->at.epoch] != g->epoch && !only_rates(g))
        return 0;
    if (elapsed - run > UNEXPLAINED_NS + g->decision)
        return others_unchanged(g, elapsed - run);
    g->reads = -1;
    if (g->count > 1) {
        credit = g->credit + elapsed * g->count;
        turn = g->turn;
        while (credit >= READ_ALL_WITHIN_NS) {
            credit -= READ_ALL_WITHIN_NS;
            turn = (turn + 1) % g->count;
            if (turn != g->pick && !unchanged(g, turn))
                return 0;
        }
    }
    return 1;
}

/* ---- the run queue ---- */

static word lag_of(const struct steady *g, const struct vcpu *vcpu)
{
    const struct entry *entry;
    if (vcpu->entry < 0) {
        double all = (double)(g->weight + vcpu->weight), share, worn;
        if (vcpu->lag >= 0.0)
            return llrint(vcpu->lag);
        share = (double)vcpu->weight / (all > UNIT ? all : UNIT);
        worn = vcpu->lag + (double)(g->clock_ns - vcpu->asleep_at) * share;
        return llrint(worn < 0.0 ? worn : 0.0);
    }
    entry = &g->entries[vcpu->entry];
    return llrint((double)entry->weight * (g->virtual_ns - entry->v));
}

static word charge(struct steady *g, word index)
{
    struct vcpu *vcpu = &g->vcpus[index];
    word ran = vcpu->seen - vcpu->charged;

    if (ran <= 0)
        return 0;
    vcpu->charged = vcpu->words[g->at.charged] = vcpu->seen;
    if (index != g->pick)
        vcpu->words[g->at.leak] += ran;
    if (vcpu->entry >= 0) {
        struct entry *entry = &g->entries[vcpu->entry];
        double delta = (double)ran / (double)entry->weight;
        entry->v += delta;
        entry->start += delta;
        entry->deadline += delta;
        g->virtual_ns += (double)ran / (double)g->weight;
    }
    return ran;
}

static void set_rate(struct steady *g, struct vcpu *vcpu, word rate)
{
    struct entry *entry;
    word weight;
    double lag, slice_v;

    vcpu->rate = rate;
    if (vcpu->entry < 0)
        return;                             /* Python does it from `rate` when it takes over */
    entry = &g->entries[vcpu->entry];
    weight = llrint((double)(rate < 1 ? 1 : rate) / ONE_CPU * UNIT);
    if (weight < 1)
        weight = 1;
    if (weight == entry->weight)
        return;
    lag = (double)entry->weight * (g->virtual_ns - entry->v);
    g->weight += weight - entry->weight;
    entry->weight = weight;
    entry->v = g->virtual_ns - lag / (double)weight;
    slice_v = (double)g->slice_ns / (double)weight;
    entry->start = entry->v - entry->credit * slice_v;
    entry->deadline = entry->start + entry->request * ((double)entry->request_ns / (double)weight);
}

static void draw(struct steady *g, struct entry *entry)
{
    word request_ns = g->slice_ns;
    if (g->jitter_ns) {
        uint64_t x = (uint64_t)g->random;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        g->random = (word)x;
        request_ns += (word)(x >> 40) * g->jitter_ns >> 24;
    }
    entry->request_ns = request_ns;
    entry->deadline = entry->start + entry->request * ((double)request_ns / (double)entry->weight);
}

static word started(struct steady *g, word index)
{
    draw(g, &g->entries[index]);
    if (index != g->current) {
        g->current = index;
        g->picked_at_ns = g->clock_ns;
    }
    return index;
}

static word least_ahead(const struct steady *g, word now)
{
    word best = -1;
    for (word i = 0; i < g->awake_count; i++)
        if (best < 0 || g->entries[i].deadline < g->entries[best].deadline)
            best = i;
    return g->entries[now].deadline <= g->entries[best].deadline ? now : best;
}

static word pick_fair(struct steady *g, word now)
{
    const struct entry *entries = g->entries;
    double same = 1.0 / (double)g->weight, eligible = g->virtual_ns + same, earliest = INFINITY;
    word best = -1;

    for (word i = 0; i < g->awake_count; i++)
        if (entries[i].deadline < earliest && entries[i].start <= eligible) {
            best = i;
            earliest = entries[i].deadline;
        }
    if (best < 0)
        return least_ahead(g, now);
    if (entries[now].start <= eligible && entries[now].deadline <= earliest + same)
        best = now;
    return best;
}

static word first_of(const struct steady *g, word mode, double ahead, word weight, word now)
{
    const struct entry *entries = g->entries;
    double same = 1.0 / (double)weight, eligible = g->virtual_ns - ahead + same;
    double earliest = INFINITY, least = INFINITY;
    word best = -1, behind = -1;

    for (word i = 0; i < g->awake_count; i++) {
        if (entries[i].mode != mode)
            continue;
        if (entries[i].deadline < earliest && entries[i].start <= eligible) {
            best = i;
            earliest = entries[i].deadline;
        }
        if (entries[i].v < least) {
            behind = i;
            least = entries[i].v;
        }
    }
    if (best < 0)
        best = behind;
    if (entries[now].mode == mode && entries[now].start <= eligible
            && entries[now].deadline <= entries[best].deadline + same)
        return now;
    return best;
}

static double bound_of(const struct steady *g, word here, word there)
{
    double total = (double)(here + there), less = (double)(here < there ? here : there) / total;
    double bound = less * (1.0 - less) * (double)g->budget_ns, most = less * (double)g->wait_max_ns;
    if (bound < (double)g->batch_ns)
        bound = (double)g->batch_ns;
    return bound < most ? bound : most;
}

static word pick_batch(struct steady *g, word now)
{
    const struct entry *entries = g->entries;
    word here = 0, there = 0, overdue = -1, mode = g->mode;
    double lag_here = 0.0, lag_there = 0.0, owed;

    for (word i = 0; i < g->awake_count; i++) {
        const struct entry *entry = &entries[i];
        double lag = (double)entry->weight * (g->virtual_ns - entry->v);
        if (entry->mode == mode) {
            here += entry->weight;
            lag_here += lag;
            continue;
        }
        there += entry->weight;
        lag_there += lag;
        if ((double)(g->clock_ns - entry->served) >= (double)g->wait_max_ns * entry->patience
                && entry->start <= g->virtual_ns
                && (overdue < 0 || entry->deadline < entries[overdue].deadline))
            overdue = i;
    }
    if (!there)
        return first_of(g, mode, lag_here / (double)here, here, now);
    owed = lag_there - (lag_here + lag_there) * (double)there / (double)(here + there);
    if (here && overdue < 0 && owed < bound_of(g, here, there))
        return first_of(g, mode, lag_here / (double)here, here, now);
    if (overdue < 0)
        overdue = first_of(g, 1 - mode, lag_there / (double)there, there, now);
    g->mode = entries[overdue].mode;
    return overdue;
}

/* The index of the entry that runs next; `now` is the one that ran. */
static word pick_next(struct steady *g, word now)
{
    if (g->batches && g->current >= 0)
        g->entries[g->current].served = g->clock_ns;
    if (now == g->current && g->clock_ns - g->picked_at_ns < g->ratelimit_ns)
        return now;
    return started(g, g->batches ? pick_batch(g, now) : pick_fair(g, now));
}

/* ---- levels ---- */

static void apply(struct steady *g, word index, enum level level)
{
    struct vcpu *vcpu = &g->vcpus[index];
    word number = g->state_of[g->breathing][level], failed = 0;
    const struct state *old, *new;

    if (!vcpu->clock_kind || vcpu->gone)
        return;
    vcpu->level = level;
    if (number == vcpu->state)
        return;
    old = &g->states[vcpu->state];
    new = &g->states[number];
    vcpu->state = number;
    if (g->calls) {
        failed = g->calls->set(index, old - g->states, number);
    } else {
        struct sched_param parameter = { .sched_priority = (int)new->priority };
        if (new->policy != old->policy) {
            if (new->policy != STOPS && sched_setscheduler((pid_t)vcpu->tid, (int)new->policy, &parameter) != 0)
                failed = errno;
        } else if (new->priority != old->priority && sched_setparam((pid_t)vcpu->tid, &parameter) != 0) {
            failed = errno;
        }
        if (!failed && new->stopped != old->stopped && kill((pid_t)vcpu->pid, new->stopped ? SIGSTOP : SIGCONT) != 0)
            failed = errno;
    }
    if (failed == ESRCH)
        vcpu->gone = 1;
    else if (failed == EPERM)
        g->block[g->at.refusals]++;
    else if (failed)
        g->error = failed;
}

static void cross_edge(struct steady *g, word now)
{
    word phase, least = g->slice_ns * 3;
    g->breathing = !g->breathing;
    g->edge_at = now;
    phase = g->breath_ns * (g->breathing ? 1 : BREATHLESS);
    g->edge = now + phase;
    g->early = (least < phase ? least : phase) / 4;
}

static void follow_breath(struct steady *g)
{
    word ready = 0;
    apply(g, g->pick, (enum level)g->vcpus[g->pick].level);
    for (word i = 0; i < g->count; i++) {
        struct vcpu *vcpu = &g->vcpus[i];
        if (vcpu->level != WAIT)
            continue;
        if (g->states[vcpu->state].stopped && !g->breathing && ++ready > READY)
            break;
        apply(g, i, WAIT);
    }
}

/* ---- the step ---- */

static void write_record(struct steady *g, const struct vcpu *pick, word now, word run, const word others[2])
{
    word head = g->block[g->at.head];
    word *record = g->ring + (head & g->ring_mask) * RECORD_WORDS;

    record[0] = g->slice_start;
    record[1] = now;
    record[2] = g->slice_end;
    record[3] = pick->slot;
    record[4] = pick->generation;
    record[5] = g->slice_previous;
    record[6] = pick->mode;
    record[7] = run;
    record[8] = others[0];
    record[9] = others[1];
    record[10] = g->slice_progress;
    record[11] = progress_of(pick);
    record[12] = g->slice_edge_late;
    record[13] = g->slice_breath;
    record[14] = g->decision;
    record[15] = g->slice_flags;
    __atomic_store_n(&g->block[g->at.head], head + 1, __ATOMIC_RELEASE);
}

static void finish(struct steady *g, word now)
{
    word start = g->slice_start, elapsed = now - start, run, others[2] = { 0, 0 };
    struct vcpu *pick = &g->vcpus[g->pick];

    g->clock_ns += elapsed;
    run = charge(g, g->pick);
    if (g->reads >= 0) {
        word turn = g->count <= AT_ONCE ? -1 : g->turn;
        for (word i = 0; i < g->reads; i++) {
            turn = (turn + 1) % g->count;
            if (turn != g->pick)
                others[g->vcpus[turn].mode] += charge(g, turn);
        }
        if (g->count > AT_ONCE)
            g->turn = turn;
    } else if (g->count > 1) {
        g->credit += elapsed * g->count;
        while (g->credit >= READ_ALL_WITHIN_NS) {
            g->credit -= READ_ALL_WITHIN_NS;
            g->turn = (g->turn + 1) % g->count;
            struct vcpu *vcpu = &g->vcpus[g->turn];
            if (g->turn != g->pick)
                others[vcpu->mode] += charge(g, g->turn);
            if (!vcpu->paused)
                vcpu->words[g->at.lag] = lag_of(g, vcpu);
        }
    }
    if (g->count <= LAGS_KEPT)
        for (word i = 0; i < g->count; i++)
            if (!g->vcpus[i].paused)
                g->vcpus[i].words[g->at.lag] = lag_of(g, &g->vcpus[i]);
    g->block[g->at.billed] = now;
    if (g->breathing)
        g->slice_breath += now - (g->edge_at > start ? g->edge_at : start);
    pick->words[g->at.slices]++;
    write_record(g, pick, now, run, others);
}

static void sync_rates(struct steady *g)
{
    for (word i = 0; i < g->count; i++) {
        struct vcpu *vcpu = &g->vcpus[i];
        word rate = vcpu->words[g->at.rate];
        if (!vcpu->paused && rate != vcpu->rate)
            set_rate(g, vcpu, rate);
    }
    g->epoch = g->words[g->at.epoch];
    g->block[g->at.seen_epoch] = g->epoch;
}

static void decide(struct steady *g, word now)
{
    word old = g->pick, grid, flags = 0;
    struct vcpu *was = &g->vcpus[old], *is;

    g->pick = g->entries[pick_next(g, was->entry)].vcpu;
    is = &g->vcpus[g->pick];
    if (g->pick != old) {
        is->words[g->at.picked] = 1;
        apply(g, g->pick, RUN);
        if (is->fresh) {
            is->fresh = 0;
            flags = RECORD_MIGRATED;
        }
        was->words[g->at.picked] = 0;
        apply(g, old, WAIT);
    }
    grid = g->slice_end + g->slice_ns;
    g->slice_end = now < grid && grid <= now + g->slice_ns ? grid : now + g->slice_ns;
    g->slice_start = now;
    g->slice_previous = was->slot;
    g->slice_progress = progress_of(is);
    g->slice_flags = flags;
    g->slice_breath = g->slice_edge_late = g->decision = 0;
}

static void step(struct steady *g, word now)
{
    if (now >= g->slice_end) {
        if (now - g->beat_seen >= HEARTBEAT_EVERY_NS)
            g->beat_seen = g->block[g->at.beat] = now;
        finish(g, now);
        if (g->words[g->at.epoch] != g->epoch)
            sync_rates(g);
        if (g->edge - now < g->early) {
            cross_edge(g, now);
            decide(g, now);
            follow_breath(g);
        } else {
            decide(g, now);
        }
    } else if (now >= g->edge) {
        if (now - g->edge > g->slice_edge_late)
            g->slice_edge_late = now - g->edge;
        if (g->breathing)
            g->slice_breath += now - (g->edge_at > g->slice_start ? g->edge_at : g->slice_start);
        cross_edge(g, now);
        follow_breath(g);
    }
}

static void note_cpu_time(struct steady *g)
{
    struct timespec t;
    if (g->calls)
        return;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    g->block[g->at.cpu_ns] = g->earlier_cpu_ns + t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* How large the structures are, for Python to compare with its own. */
word steady_size(word which)
{
    static const word sizes[] = { VERSION, sizeof(struct steady), sizeof(struct entry), sizeof(struct vcpu),
                                  sizeof(struct calls) };
    return which < (word)(sizeof sizes / sizeof *sizes) ? sizes[which] : -1;
}

/* Whether the supervisor wants the slice to end (dispatching.py) before it is `due`. */
static int sleep_until(const struct steady *g, word now, word due)
{
    sigset_t only;
    struct timespec left;

    if (g->calls)
        return (int)g->calls->sleep_until(due);
    sigemptyset(&only);
    sigaddset(&only, SIGURG);
    for (; now < due; now = monotonic(g)) {
        left.tv_sec = (due - now) / 1000000000;
        left.tv_nsec = (due - now) % 1000000000;
        if (sigtimedwait(&only, NULL, &left) == SIGURG)
            return 1;
        if (errno != EINTR)
            return 0;
    }
    return 0;
}

/*
 * Sleep and take steps for as long as they are usual. On return `now` is when the next step is to be taken, by
 * Python, and nothing of it has been done. It is 0 between two steps: when so many as asked for were taken, when a call
 * failed that should not (`error`), or when the picked thread is `gone`.
 */
void steady_run(struct steady *g)
{
    word before = monotonic(g);

    if (g->before)
        g->decision += before - g->before;
    for (;;) {
        word due = g->slice_end < g->edge ? g->slice_end : g->edge;
        int interrupted = due > before && sleep_until(g, before, due);
        g->now = monotonic(g);
        if (interrupted && g->now < g->slice_end)
            g->slice_end = g->now;
        if (!usual(g, g->now))
            return;
        step(g, g->now);
        if (!(++g->steps & 15))
            note_cpu_time(g);
        before = monotonic(g);
        g->decision += before - g->now;
        if ((g->limit && !--g->limit) || g->error || g->vcpus[g->pick].gone) {
            g->now = 0;
            return;
        }
    }
}
