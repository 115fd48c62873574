"use strict";
// Rates, percentiles and problems from the documents of /status.json. Nothing here touches the page.

const WINDOW = 5; // seconds over which rates and percentiles are taken
const LONG_WAIT = 0.25; // seconds of waiting for a turn that are a warning: half of what a server allows
const STALE = 4; // seconds after which a shard's figures are called old

// ---- numbers as text

function digits(value, number) {
  const text = value.toPrecision(number);
  return text.includes("e") ? String(Number(text)) : text; // 99.9 with two digits is "1.0e+2"
}

function count(value) {
  if (value === null || !isFinite(value)) return "–";
  const abs = Math.abs(value);
  if (abs >= 1e12) return `${digits(value / 1e12, 3)} T`;
  if (abs >= 1e9) return `${digits(value / 1e9, 3)} G`;
  if (abs >= 1e6) return `${digits(value / 1e6, 3)} M`;
  if (abs >= 1e4) return Math.round(value).toLocaleString("en");
  if (abs >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return abs >= 10 ? value.toFixed(1) : value.toFixed(2);
}

function bytes(value) {
  if (value === null || !isFinite(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) { value /= 1024; at += 1; }
  return `${at === 0 || value >= 100 ? Math.round(value) : digits(value, 3)} ${units[at]}`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined || !isFinite(seconds)) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

function milliseconds(seconds) {
  if (seconds === null) return "–";
  if (seconds === Infinity) return "> 5 s";
  const value = seconds * 1000;
  if (value >= 1000) return `${digits(seconds, 2)} s`;
  return `${value >= 100 ? Math.round(value) : digits(value, 2)} ms`;
}

function percent(share) {
  return share === null ? "–" : `${share > 0 && share < 0.01 ? "< 1" : Math.round(share * 100)} %`;
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const most = (values) => values.reduce((a, b) => (b !== null && (a === null || b > a) ? b : a), null);

// ---- differences of two figures of one shard

// Seconds below which a share of the requests was, from numbers of requests per bucket. null: there
// were no requests. Infinity: it is above the largest bound.
function quantile(bounds, buckets, share) {
  const total = sum(buckets);
  if (!total) return null;
  let rest = share * total;
  for (let at = 0; at < bounds.length; at += 1) {
    if (rest <= buckets[at]) {
      const low = at ? bounds[at - 1] : 0;
      return low + ((bounds[at] - low) * rest) / buckets[at];
    }
    rest -= buckets[at];
  }
  return Infinity;
}

function timingBetween(after, before) {
  if (!after) return { bounds: [], buckets: [] };
  const old = before && before.buckets.length === after.buckets.length ? before.buckets : [];
  return { bounds: after.bounds, buckets: after.buckets.map((n, at) => n - (old[at] || 0)) };
}

function together(timings) {
  const some = timings.filter((each) => each.buckets.length);
  if (!some.length) return { bounds: [], buckets: [] };
  const same = some.filter((each) => each.bounds.length === some[0].bounds.length);
  return {
    bounds: some[0].bounds,
    buckets: some[0].buckets.map((_, at) => sum(same.map((each) => each.buckets[at]))),
  };
}

const named = (list, field) => new Map((list || []).map((each) => [each[field], each]));

// Figures of the last WINDOW seconds of one shard.
class Shard {
  constructor() { this.samples = []; }

  add(status) {
    const last = this.samples.at(-1);
    if (last && last.start !== status.start) this.samples = [];
    else if (last && status.uptime_seconds <= last.uptime_seconds) return;
    this.samples.push(status);
    while (this.samples.length > 2 && status.uptime_seconds - this.samples[1].uptime_seconds >= WINDOW) this.samples.shift();
  }

  get now() { return this.samples.at(-1); }

  // Differences since the oldest sample; null: there is only one sample.
  get recent() {
    const now = this.now, then = this.samples[0];
    if (!now || now === then) return null;
    const seconds = now.uptime_seconds - then.uptime_seconds;
    const rate = (a, b) => (a - (b || 0)) / seconds;
    const before = named(then.methods, "method");
    const methods = now.methods.map((each) => {
      const old = before.get(each.method) || {};
      return {
        method: each.method,
        requests: rate(each.requests, old.requests),
        keys: rate(each.keys, old.keys),
        bytes: rate(each.bytes, old.bytes),
        latency: timingBetween(each.latency, old.latency),
      };
    });
    const old = named(then.tables, "name");
    const tables = new Map(now.tables.filter((each) => old.has(each.name)).map((each) => [each.name, {
      requests: rate(each.requests, old.get(each.name).requests),
      pulled: rate(each.pulled_keys, old.get(each.name).pulled_keys),
      pushed: rate(each.pushed_keys, old.get(each.name).pushed_keys),
    }]));
    const errors = (status) => sum(status.errors.map((each) => each.count));
    return {
      seconds, methods, tables,
      requests: sum(methods.map((each) => each.requests)),
      keys: sum(methods.map((each) => each.keys)),
      errors: rate(errors(now), errors(then)),
      refused: rate(refusals(now), refusals(then)),
      latency: together(methods.map((each) => each.latency)),
      busy: now.engine && then.engine ? rate(now.engine.busy_seconds, then.engine.busy_seconds) : null,
      queue: timingBetween(now.request_queue, then.request_queue),
      fsync: timingBetween(now.log && now.log.fsync, then.log && then.log.fsync),
    };
  }
}

function refusals(status) {
  return sum(status.errors.filter((each) => each.code === "RESOURCE_EXHAUSTED").map((each) => each.count));
}

// Whether a shard has read its rows: before, it knows neither tables nor requests.
const recovered = (status) => Boolean(status.engine);

// Seconds that the slowest subscriber is behind; null: there is none.
const lagOf = (status) => (status.subscribers && status.subscribers.subscribers ? status.subscribers.lag_seconds : null);

const phaseOf = (status) => status.phase.replace("PHASE_", "").toLowerCase().replaceAll("_", " ");

// ---- what is wrong

const BAD = "bad", WARN = "warn";
const PHASES = {
  kernels: "starts: it loads its compiled kernels", gpu: "starts: it opens the GPU",
  recovery: "starts: it reads its rows and replays its log",
  restoring: "refuses requests: a checkpoint is being restored", draining: "stops",
  "not a shard": "is not a shard of this cluster: its number is too large",
};

const STARTING = ["kernels", "gpu", "recovery"];

function isNumber(budget) { return budget.name.startsWith("max_") && !budget.name.endsWith("_bytes"); }

const shareOf = (budget) => (budget.limit > 0 ? budget.used / budget.limit : 0);

// Severity of a budget that is nearly used up, or "". Tables may fill their memory if they can leave
// rows on disk.
function budgetState(budget, status) {
  if ((budget.name === "host_bytes" && status.storage) || budget.name === "hbm_bytes") return "";
  const share = shareOf(budget);
  if (share >= (budget.name === "process" ? 1 : 0.95)) return BAD;
  return share >= 0.85 ? WARN : "";
}

// Returns the problems of one shard as [severity, text].
function problemsOf(entry, shard) {
  const found = [], status = entry.status, recent = shard.recent;
  const say = (severity, text) => found.push([severity, `Shard ${entry.shard} ${text}`]);
  if (entry.problem) {
    const since = entry.age_seconds === undefined ? "" : ` for ${duration(entry.age_seconds)}`;
    say(BAD, `does not answer${since}: ${entry.problem}`);
    return found;
  }
  if (!status) return found;
  if (entry.age_seconds > STALE) say(BAD, `has not answered for ${duration(entry.age_seconds)}`);
  const phase = phaseOf(status);
  if (phase !== "ready") say(BAD, `${PHASES[phase] || phase} (for ${duration(status.phase_seconds)})`);
  if (status.damaged_blocks) say(BAD, `has ${count(status.damaged_blocks)} damaged blocks on disk: see psctl verify`);
  if (status.storage && status.storage.flush_failure) say(BAD, `could not flush to disk: ${status.storage.flush_failure}`);
  else if (status.storage && phase === "ready" && status.storage.flush_age_seconds > 900) say(WARN, `has not flushed for ${duration(status.storage.flush_age_seconds)}`);
  for (const each of status.budgets) {
    const state = budgetState(each, status);
    if (state) say(state, `has used ${percent(shareOf(each))} of ${each.name}`);
  }
  if (status.subscribers && status.subscribers.lag_seconds > 10) say(WARN, `: a subscriber is ${duration(status.subscribers.lag_seconds)} behind`);
  if (recent && recent.busy > 0.9) say(WARN, `has a busy engine (${percent(recent.busy)}): it is near its capacity`);
  const waited = recent ? quantile(recent.queue.bounds, recent.queue.buckets, 0.99) : null;
  if (waited > LONG_WAIT) say(WARN, `lets requests wait for their turn (p99 of those that wait: ${milliseconds(waited)}): its engine or its processor is too busy`);
  if (recent && recent.refused > 0) say(WARN, `refuses ${count(recent.refused)} requests per second (RESOURCE_EXHAUSTED)`);
  if (status.gpu_paused) say(WARN, "moves no rows to the GPU: it has no memory");
  const left = status.certificate_expires ? status.certificate_expires - status.time : Infinity;
  if (left <= 0) say(BAD, "has an expired certificate");
  else if (left < 14 * 86400) say(WARN, `has a certificate that expires in ${duration(left)}`);
  return found;
}

// Returns the problems of all shards, the worst first.
function problemsOfAll(entries, shards) {
  const found = entries.flatMap((entry) => problemsOf(entry, shards.get(entry.shard)));
  const live = entries.filter((entry) => entry.status && !entry.problem).map((entry) => entry.status);
  const releases = [...new Set(live.map((status) => status.release))];
  if (releases.length > 1) found.push([WARN, `The shards have different releases: ${releases.join(", ")}`]);
  const longest = Math.max(0, ...live.map((status) => status.uptime_seconds));
  for (const each of live) {
    if (each.uptime_seconds < 600 && longest > 2 * each.uptime_seconds + 60) found.push([WARN, `Shard ${each.shard} restarted ${duration(each.uptime_seconds)} ago`]);
  }
  return found.sort(([a], [b]) => (a === b ? 0 : a === BAD ? -1 : 1));
}
