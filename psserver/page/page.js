// The page: asks for the figures every second and shows them. Data becomes text, never markup.

const EVERY = 1000; // milliseconds between two requests
const PATIENCE = 5000; // milliseconds until a request counts as unanswered
const SHOWN_TABLES = 50;
const METHODS = ["Pull", "Push", "Exchange", "Delete"];

const element = (id) => document.getElementById(id);
const shards = new Map(); // number -> Shard
let answered = null; // time of the last answer, in milliseconds

function setText(node, text) { if (node.textContent !== text) node.textContent = text; }

// ---- tables

// Shows rows in a table, and keeps the elements of what has not changed, so that text stays selected.
//   columns  [name, kind]; the text of a kind is left-aligned. "head" names the row. On small screens
//            "long" is wide, and "full" has a line of its own
//   rows     {state, cells}; a cell is a text or {text, state, share}
function fill(id, columns, rows) {
  const table = element(id);
  if (!rows.length) { table.replaceChildren(); return; }
  if (!table.tHead) {
    const line = table.createTHead().insertRow();
    for (const [name, kind] of columns) {
      const head = document.createElement("th");
      head.scope = "col";
      head.textContent = name;
      if (kind) head.className = "text";
      line.append(head);
    }
    table.createTBody();
  }
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((row, at) => {
    const line = body.rows[at] || body.insertRow();
    if (line.className !== (row.state || "")) line.className = row.state || "";
    row.cells.forEach((cell, column) => fillCell(line.cells[column] || line.insertCell(), cell, columns[column]));
  });
}

function fillCell(node, cell, [name, kind]) {
  const { text, state = "", share = null } = typeof cell === "string" ? { text: cell } : cell;
  const kinds = [kind ? "text" : "", kind || "", state, share === null ? "" : "wide", text ? "" : "empty"];
  const classes = kinds.filter(Boolean).join(" ");
  if (node.className !== classes) node.className = classes;
  if (!node.firstChild) {
    node.dataset.label = name;
    node.append(document.createElement("span"));
  }
  setText(node.firstChild, text);
  if (share === null) {
    if (node.childNodes.length > 1) node.lastChild.remove();
    return;
  }
  if (node.childNodes.length < 2) {
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.append(document.createElement("span"));
    node.append(bar);
  }
  node.lastChild.firstChild.style.width = `${Math.min(100, 100 * share).toFixed(1)}%`;
}

function showCards(cards) {
  const parent = element("cards");
  cards.forEach(([name, value, state], at) => {
    let card = parent.children[at];
    if (!card) {
      card = document.createElement("div");
      card.append(document.createElement("b"), document.createElement("span"));
      parent.append(card);
    }
    card.className = `card ${state || ""}`;
    setText(card.firstChild, value);
    setText(card.lastChild, name);
  });
}

function showVerdict(state, text, problems) {
  const box = element("verdict"), list = element("problems");
  if (box.className !== state) box.className = state;
  setText(element("verdict-text"), text);
  while (list.children.length > problems.length) list.lastChild.remove();
  problems.forEach(([severity, problem], at) => {
    const item = list.children[at] || list.appendChild(document.createElement("li"));
    item.className = severity;
    setText(item, problem);
  });
}

// ---- sections

const plots = {
  requests: new Plot(element("plots"), "Requests per second", METHODS, count, 10),
  latency: new Plot(element("plots"), "Latency on the server", ["p50", "p99"], milliseconds, 0.01),
  keys: new Plot(element("plots"), "Keys per second", ["keys"], count, 100),
  busy: new Plot(element("plots"), "Engine busy", ["busiest shard", "mean"], percent, 1),
  errors: new Plot(element("plots"), "Failed requests per second", ["all", "refused for overload"], count, 1),
  lag: new Plot(element("plots"), "Subscriber lag", ["slowest"], duration, 1),
};

function showPlots(live) {
  const now = Date.now() / 1000, recents = live.map(([, shard]) => shard.recent).filter(Boolean);
  const byMethod = (method) => sum(recents.flatMap((each) => each.methods).filter((each) => each.method === method).map((each) => each.requests));
  const latency = together(recents.map((each) => each.latency)), busy = recents.map((each) => each.busy).filter((each) => each !== null);
  const some = (value) => (recents.length ? value : null);
  plots.requests.add(now, METHODS.map((method) => some(byMethod(method))));
  plots.latency.add(now, [0.5, 0.99].map((share) => quantile(latency.bounds, latency.buckets, share)));
  plots.keys.add(now, [some(sum(recents.map((each) => each.keys)))]);
  plots.busy.add(now, [most(busy), busy.length ? sum(busy) / busy.length : null]);
  plots.errors.add(now, [some(sum(recents.map((each) => each.errors))), some(sum(recents.map((each) => each.refused)))]);
  plots.lag.add(now, [most(live.map(([entry]) => lagOf(entry.status)))]);
  return { recents, latency };
}

function showTotals(entries, live, problems) {
  const { recents, latency } = showPlots(live);
  const ready = live.filter(([entry]) => phaseOf(entry.status) === "ready").length;
  const errors = sum(recents.map((each) => each.errors)), some = (value) => (recents.length ? value : null);
  const lag = most(live.map(([entry]) => lagOf(entry.status)));
  showCards([
    ["shards ready", `${ready} of ${entries.length}`, ready === entries.length ? "" : BAD],
    ["rows", count(live.some(([entry]) => recovered(entry.status)) ? sum(live.map(([entry]) => entry.status.rows)) : null)],
    ["requests/s", count(some(sum(recents.map((each) => each.requests))))],
    ["keys/s", count(some(sum(recents.map((each) => each.keys))))],
    ["p50 latency", milliseconds(quantile(latency.bounds, latency.buckets, 0.5))],
    ["p99 latency", milliseconds(quantile(latency.bounds, latency.buckets, 0.99))],
    ["failed requests/s", count(some(errors)), errors > 0 ? WARN : ""],
    ["subscriber lag", duration(lag), lag > 10 ? WARN : ""],
  ]);
  const worst = problems.some(([severity]) => severity === BAD) ? BAD : problems.length ? WARN : "ok";
  const down = entries.length - ready;
  const text = down ? `${down} of ${entries.length} shards ${down === 1 ? "is" : "are"} not ready`
    : worst === BAD ? "All shards are ready, but something is wrong"
      : worst === WARN ? "All shards are ready, with warnings" : `All ${entries.length} shards are ready`;
  showVerdict(worst, entries.length === 1 && worst === "ok" ? "The shard is ready" : text, problems);
  document.title = `${ready}/${entries.length} ready · ${element("cluster").textContent}`;
}

// How many requests wait for their turn, and the 99th percentile of recent waits.
function waitOf(status, recent) {
  const seconds = quantile(recent.queue.bounds, recent.queue.buckets, 0.99), waiting = count(status.requests_waiting || 0);
  return { text: seconds === null ? waiting : `${waiting} (${milliseconds(seconds)})`, state: seconds > LONG_WAIT ? WARN : "" };
}

function showShards(entries) {
  const rows = entries.map((entry) => {
    const status = entry.status, shard = shards.get(entry.shard), dead = Boolean(entry.problem);
    const state = problemsOf(entry, shard).reduce((a, [severity]) => (a === BAD ? a : severity), "");
    if (!status) return { state: BAD, cells: [String(entry.shard), { text: "no answer", state: BAD }, entry.address, ...Array(10).fill("")] };
    const recent = dead || !recovered(status) ? null : shard.recent, latency = recent ? recent.latency : { bounds: [], buckets: [] };
    const memory = status.budgets.find((each) => each.name === "host_bytes");
    const phase = dead ? "no answer" : STARTING.includes(phaseOf(status)) ? "starting" : phaseOf(status);
    return {
      state: dead ? `${BAD} old` : state,
      cells: [
        String(entry.shard),
        { text: phase, state: phase === "ready" ? "ok" : BAD },
        entry.address || status.advertise,
        dead ? "" : duration(status.uptime_seconds),
        recovered(status) ? count(status.rows) : "–",
        memory ? { text: `${bytes(memory.used)} of ${bytes(memory.limit)}`, share: shareOf(memory) } : "",
        recent ? count(recent.requests) : "",
        recent ? milliseconds(quantile(latency.bounds, latency.buckets, 0.5)) : "",
        recent ? milliseconds(quantile(latency.bounds, latency.buckets, 0.99)) : "",
        recent && recent.busy !== null ? { text: percent(recent.busy), state: recent.busy > 0.9 ? WARN : "" } : "",
        recent ? waitOf(status, recent) : "",
        recent && recent.errors ? { text: count(recent.errors), state: WARN } : recent ? "0" : "",
        !status.subscribers || dead ? "" : status.subscribers.subscribers ? `${status.subscribers.subscribers} (${duration(status.subscribers.lag_seconds)})` : "0",
      ],
    };
  });
  fill("shards", [["shard", "head"], ["state", "text"], ["address", "long"], ["up"], ["rows"], ["table memory"], ["requests/s"], ["p50"], ["p99"], ["engine busy"], ["waiting (p99)"], ["failed/s"], ["subscribers (lag)"]], rows);
}

function showMethods(live) {
  const rows = METHODS.map((method) => {
    const now = live.map(([, shard]) => shard.recent).filter(Boolean).flatMap((each) => each.methods).filter((each) => each.method === method);
    const all = live.flatMap(([entry]) => entry.status.methods).filter((each) => each.method === method);
    const latency = together(now.map((each) => each.latency));
    const total = (field) => sum(now.map((each) => each[field]));
    return { all: sum(all.map((each) => each.requests)), cells: [
      method, count(total("requests")), count(total("keys")), `${bytes(total("bytes"))}/s`,
      ...[0.5, 0.9, 0.99].map((share) => milliseconds(quantile(latency.bounds, latency.buckets, share))),
      count(sum(all.map((each) => each.requests))),
    ] };
  }).filter((row) => row.all);
  fill("methods", [["method", "head"], ["requests/s"], ["keys/s"], ["arrays"], ["p50"], ["p90"], ["p99"], ["since the start"]], rows);
  setText(element("no-requests"), rows.length ? "" : "No request has arrived since the shards started.");
}

function showTables(live) {
  const tables = new Map();
  for (const [entry, shard] of live) {
    const recent = shard.recent;
    for (const each of entry.status.tables) {
      const table = tables.get(each.name) || { rows: 0, bytes: 0, tiers: new Map(), requests: 0, pulled: 0, pushed: 0, damaged: 0, lost: 0 };
      tables.set(each.name, table);
      const rates = (recent && recent.tables.get(each.name)) || { requests: 0, pulled: 0, pushed: 0 };
      table.rows += each.rows; table.bytes += each.bytes; table.damaged += each.damaged_blocks; table.lost += each.lost_rows;
      table.requests += rates.requests; table.pulled += rates.pulled; table.pushed += rates.pushed;
      for (const tier of each.tiers) {
        const old = table.tiers.get(tier.tier) || { rows: 0, hits: 0, misses: 0 };
        table.tiers.set(tier.tier, { rows: old.rows + tier.rows, hits: old.hits + tier.hits, misses: old.misses + tier.misses });
      }
    }
  }
  const sorted = [...tables].sort(([, a], [, b]) => b.rows - a.rows);
  const rows = sorted.slice(0, SHOWN_TABLES).map(([name, table]) => {
    const tiers = [...table.tiers].map(([tier, each]) => `${tier} ${count(each.rows)}`).join(" · ");
    const host = [...table.tiers.values()][0], used = host ? host.hits + host.misses : 0;
    return { state: table.lost ? BAD : "", cells: [
      name, count(table.rows), bytes(table.bytes), { text: tiers }, used ? percent(host.hits / used) : "–",
      count(table.requests), count(table.pulled), count(table.pushed),
      table.damaged ? { text: `${count(table.damaged)} blocks, ${count(table.lost)} rows lost`, state: BAD } : "none",
    ] };
  });
  fill("tables", [["table", "head"], ["rows"], ["memory"], ["rows by tier", "text"], ["hits in fastest tier"], ["requests/s"], ["keys pulled/s"], ["keys pushed/s"], ["damage"]], rows);
  const total = Math.max(sorted.length, ...live.map(([entry]) => entry.status.table_count));
  const rest = total - rows.length;
  setText(element("more-tables"), !live.some(([entry]) => recovered(entry.status)) ? "No shard has read its tables yet." : !total ? "There are no tables." : rest > 0 ? `${count(rest)} smaller tables are not shown: see psctl tables.` : "");
}

function showBudgets(live) {
  const worst = new Map();
  for (const [entry] of live) for (const budget of entry.status.budgets) {
    const old = worst.get(budget.name);
    if (!old || shareOf(budget) > shareOf(old.budget)) worst.set(budget.name, { budget, entry });
  }
  const sorted = [...worst.values()].sort((a, b) => shareOf(b.budget) - shareOf(a.budget));
  const rows = sorted.map(({ budget, entry }) => {
    const text = isNumber(budget) ? count : bytes, state = budgetState(budget, entry.status);
    return { state, cells: [
      budget.name, String(entry.shard), text(budget.used), budget.limit ? text(budget.limit) : "no limit",
      { text: percent(shareOf(budget)), share: shareOf(budget), state },
    ] };
  });
  fill("budgets", [["budget", "head"], ["shard"], ["used"], ["limit"], ["share", "share"]], rows);
}

function showDisk(live) {
  const rows = live.filter(([entry]) => entry.status.storage && entry.status.log).map(([entry, shard]) => {
    const { storage, log, version } = entry.status, fsync = shard.recent ? shard.recent.fsync : { bounds: [], buckets: [] };
    return { state: storage.flush_failure ? BAD : "", cells: [
      String(entry.shard), count(version), count(version - log.durable_version), milliseconds(quantile(fsync.bounds, fsync.buckets, 0.99)),
      bytes(log.bytes), bytes(log.backlog_bytes), storage.flush_failure ? { text: storage.flush_failure, state: BAD } : `${duration(storage.flush_age_seconds)} ago`,
      storage.checkpoint_age_seconds === undefined ? "none since the start" : `${duration(storage.checkpoint_age_seconds)} ago`,
      storage.restore ? `restores ${storage.restore} (${storage.restore_phase})` : storage.work || "nothing",
    ] };
  });
  const known = live.some(([entry]) => recovered(entry.status));
  setText(element("no-disk"), rows.length ? "" : known ? "The shards have no data directory: a restart loses all rows." : "No shard has read its data yet.");
  fill("disk", [["shard", "head"], ["version"], ["versions not synced"], ["p99 of fsync"], ["log size"], ["log backlog"], ["last flush"], ["last checkpoint"], ["at work on", "text"]], rows);
}

function showErrors(live) {
  const kinds = new Map(); // the same error of several shards is one row
  for (const [entry] of live) for (const each of entry.status.recent_errors) {
    const kind = JSON.stringify([each.method, each.code, each.reason, each.message]);
    const old = kinds.get(kind) || { ...each, time: 0, count: 0, shards: [] };
    kinds.set(kind, { ...old, time: Math.max(old.time, each.time), count: old.count + each.count, shards: [...old.shards, entry.shard] });
  }
  const errors = [...kinds.values()].sort((a, b) => b.time - a.time).slice(0, 32);
  const rows = errors.map((each) => ({ cells: [
    new Date(each.time * 1000).toLocaleString("en-GB"), each.shards.join(", "), each.method, each.reason || each.code, each.message, count(each.count),
  ] }));
  fill("errors", [["newest", "head"], ["shards", "text"], ["method", "text"], ["reason", "text"], ["message", "full"], ["times"]], rows);
  setText(element("no-errors"), rows.length ? "" : "No request has failed since the shards started.");
}

// ---- every second

function show(found) {
  for (const entry of found.shards) {
    if (!shards.has(entry.shard)) shards.set(entry.shard, new Shard());
    if (entry.status) shards.get(entry.shard).add(entry.status);
  }
  const live = found.shards.filter((entry) => entry.status && !entry.problem).map((entry) => [entry, shards.get(entry.shard)]);
  const problems = problemsOfAll(found.shards, shards);
  const releases = [...new Set(live.map(([entry]) => entry.status.release))];
  const cluster = live.map(([entry]) => entry.status.cluster).find(Boolean);
  setText(element("cluster"), cluster || "embedding-ps");
  setText(element("about"), `release ${releases.join(", ")}, seen from shard ${found.shard}`);
  showTotals(found.shards, live, problems);
  showShards(found.shards);
  showMethods(live);
  showTables(live);
  showBudgets(live);
  showDisk(live);
  showErrors(live);
}

async function tick() {
  try {
    const answer = await fetch("status.json", { signal: AbortSignal.timeout(PATIENCE), cache: "no-store" });
    if (!answer.ok) throw new Error(`it answers with status ${answer.status}`);
    show(await answer.json());
    answered = Date.now();
    document.body.className = "";
  } catch (error) {
    const since = answered === null ? "" : ` The figures below are ${duration((Date.now() - answered) / 1000)} old.`;
    document.body.className = "stale";
    showVerdict(BAD, "The server of this page does not answer", [[BAD, `${error.message}.${since}`]]);
    document.title = "no answer · embedding-ps";
  }
  setTimeout(tick, EVERY);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => Object.values(plots).forEach((each) => each.draw()));
tick();
