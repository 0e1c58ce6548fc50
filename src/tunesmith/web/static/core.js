// What every page stands on: texts, the API, jobs, the address, the session. No page talks to the server but through here.
import { html as written, useCallback, useEffect, useMemo, useReducer, useState } from "./vendor/preact-htm.js";

export * from "./vendor/preact-htm.js";

// --- What is shown -------------------------------------------------------------------------------------------------

const UNSEEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]/u;
const EACH_UNSEEN = new RegExp(UNSEEN, "gu");
// As they are: tab, line feed, and the joiners that Indic scripts, Persian and emoji need.
const LEFT = new Set("\t\n\u200c\u200d");

/** A text whose characters that are unseen or steer the display are visible, as the report shows them. */
export function visible(text) {
  return UNSEEN.test(text) ? text.replaceAll("\r\n", "\n").replace(EACH_UNSEEN, (sign) => (LEFT.has(sign) ? sign : named(sign.codePointAt(0)))) : text;
}

const named = (code) =>
  code < 0x20 ? String.fromCodePoint(0x2400 + code) : code === 0x7f ? "␡" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;

// Every text of every element goes through here, so that no page has to think of it; so do attributes that are read.
const SAID = ["children", "title", "aria-label", "placeholder"];
function shownSafely(node) {
  if (Array.isArray(node)) return node.map(shownSafely);
  if (typeof node === "string") return visible(node);
  if (typeof node?.type !== "string") return node;
  for (const name of SAID) if (node.props[name] !== undefined) node.props[name] = shownSafely(node.props[name]);
  return node;
}

/** Markup as htm reads it; its texts are only ever text nodes, and visible. */
export const html = (...parts) => shownSafely(written(...parts));

// A value that many components read; set() draws those that use() it again.
function shared(initial) {
  const readers = new Set();
  const box = {
    value: initial,
    set(value) {
      box.value = value;
      for (const draw of [...readers]) draw();
    },
    use() {
      const [, draw] = useReducer((count) => count + 1, 0);
      useEffect(() => {
        const before = box.value;
        readers.add(draw);
        if (before !== box.value) draw();
        return () => readers.delete(draw);
      }, []);
      return box.value;
    },
  };
  return box;
}

const store = (area, key, value) => {
  try {
    if (value === undefined) return window[area].getItem(key);
    if (value === null) window[area].removeItem(key);
    else window[area].setItem(key, value);
  } catch {
    // Storage may be forbidden; the page then forgets at a reload.
  }
  return null;
};

/** Read or write a small setting that outlives the tab; null forgets it. */
export const remembered = (key, value) => store("localStorage", `tunesmith.${key}`, value);
/** The same for this tab alone. */
export const kept = (key, value) => store("sessionStorage", `tunesmith.${key}`, value);

// --- Texts ---------------------------------------------------------------------------------------------------------

export const LANGUAGES = ["zh", "en"];
const lang = shared(null);
const texts = {};

/** The language the page is in; the component is drawn again when it changes. */
export const useLang = () => lang.use();
export const currentLang = () => lang.value;

/** Change the language; chats, jobs and forms stay as they are. */
export async function setLang(wanted) {
  texts[wanted] ??= await api.get(`texts/${wanted}`);
  remembered("lang", wanted);
  document.documentElement.lang = wanted === "zh" ? "zh-CN" : "en";
  lang.set(wanted);
}

const firstLang = () => {
  const asked = [new URLSearchParams(location.search).get("lang"), remembered("lang"), ...navigator.languages];
  return asked.map((name) => name?.slice(0, 2).toLowerCase()).find((name) => LANGUAGES.includes(name)) ?? "en";
};

export const hasText = (key) => key in (texts[lang.value] ?? {});

/** A text as it is written, its placeholders unfilled; null where there is none. */
export const template = (key) => texts[lang.value]?.[key] ?? null;

/** A text in the language of the page; `{name:spec}` is filled as Python's str.format fills it. */
export const t = (key, params = {}) => fill(template(key) ?? key, params);

const PLACE = /\{(\w+)(?::([^{}]*))?\}/g;
/** Fill the placeholders of a template; what is not given is shown as a dash. */
export const fill = (text, params) => text.replace(PLACE, (_, name, spec) => shown(params[name], spec));

// The sentences of errors that have placeholders, as patterns: those first that leave the least to be filled.
const patterns = {};
const patternsOf = (language) =>
  Object.keys(texts[language] ?? {})
    .filter((key) => key.startsWith("what.") && key.includes("{"))
    .map((key) => {
      const said = key.slice("what.".length).split(/\{\w+\}/);
      const escaped = said.map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
      const names = [...key.matchAll(PLACE)].map(([, name]) => name);
      return { key, names, length: said.join("").length, pattern: new RegExp(`^${escaped.join("(.+?)")}$`, "su") };
    })
    .sort((left, right) => right.length - left.length);

/** What an error of the library says, in the language of the page; as it is where there is no text for it. */
export function sentence(what) {
  const known = (said) => (hasText(`what.${said}`) ? t(`what.${said}`) : null);
  if (known(what) !== null) return known(what);
  for (const { key, names, pattern } of (patterns[lang.value] ??= patternsOf(lang.value))) {
    const found = pattern.exec(what);
    if (found) return t(key, Object.fromEntries(names.map((name, at) => [name, known(found[at + 1]) ?? found[at + 1]])));
  }
  return what;
}

const OURS = {
  bytes: (value) => bytes(value),
  nats: (value) => nats(value),
  figure: (value) => figure(value),
  percent: (value) => `${points(value)}%`,
  points: (value) => points(value),
};

function shown(value, spec = "") {
  if (value === null || value === undefined) return "–";
  if (!spec || typeof value !== "number") return plain(value);
  const kind = spec.replace(/^\+/, "");
  const sign = spec.startsWith("+") && value > 0 ? "+" : "";
  if (OURS[kind] || !Number.isFinite(value)) return sign + (OURS[kind] ?? figure)(value).replace("−", "-");
  return (spec.startsWith("+") && value >= 0 ? "+" : "") + asPython(value, kind);
}

// As toFixed, but an exact half goes to the even neighbour, as in Python.
function fixed(value, digits) {
  const scaled = value * 10 ** digits;
  const half = Math.abs(scaled % 1) === 0.5 && Number.isInteger(value * 2 ** (digits + 1));
  return (half ? (2 * Math.round(scaled / 2)) / 10 ** digits : value).toFixed(digits);
}

// The same for toExponential.
function exponential(value, digits) {
  const [whole, power] = value.toExponential(Math.min(100, digits + 40)).split("e");
  const cut = whole.indexOf(".") + 1 + digits;
  const half = /^50*$/.test(whole.slice(cut)) && "02468".includes(whole.slice(0, cut).replace(/\.$/, "").at(-1));
  return half ? `${digits ? whole.slice(0, cut) : whole.slice(0, cut - 1)}e${power}` : value.toExponential(digits);
}

function asPython(value, spec) {
  const [, comma, , places, kind] = /^(,?)(\.(\d+))?([fge%]?)$/.exec(spec) ?? [];
  const digits = places === undefined ? 6 : Number(places);
  if (kind === "%") return `${grouped(fixed(100 * value, digits), comma)}%`;
  if (kind === "f") return grouped(fixed(value, digits), comma);
  if (kind === "e") return exponent(exponential(value, digits));
  if (kind === "g") return general(value, digits || 1);
  return grouped(bare(value), comma);
}

function general(value, digits) {
  if (value === 0) return "0";
  const power = Number(exponential(value, digits - 1).split("e")[1]);
  if (power < -4 || power >= digits) {
    const [mantissa, rest] = exponential(value, digits - 1).split("e");
    return exponent(`${trimmed(mantissa)}e${rest}`);
  }
  return trimmed(fixed(value, Math.max(0, digits - 1 - power)));
}

const trimmed = (number) => (number.includes(".") ? number.replace(/\.?0+$/, "") : number);
const exponent = (number) => number.replace(/e([+-])(\d)$/, "e$10$2");
const grouped = (number, comma) => (comma ? number.replace(/^-?\d+/, (whole) => Number(whole).toLocaleString("en")) : number);
// As Python writes a number that nothing is asked of: its exponents begin sooner than JavaScript's.
const bare = (value) => (value !== 0 && Math.abs(value) < 1e-4 ? exponent(value.toExponential()) : String(value));
const plain = (value) => (typeof value === "object" ? JSON.stringify(value) : typeof value !== "number" ? String(value) : Number.isFinite(value) ? bare(value) : figure(value).replace("−", "-"));

const UNITS = ["B", "KiB", "MiB", "GiB"];
function bytes(size) {
  for (const unit of UNITS) {
    if (size < 1024) return unit === "B" || size >= 100 ? `${grouped(fixed(size, 0), true)} ${unit}` : `${fixed(size, 1)} ${unit}`;
    size /= 1024;
  }
  return `${grouped(size.toFixed(1), true)} TiB`;
}

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
/** A number to three significant digits; a dash where there is none. */
export function figure(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") value = Number(value === "NaN" ? NaN : value);
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 0.001 && size < 10000) {
    return grouped(fixed(value, Math.max(0, 2 - Math.floor(Math.log10(size)))), true).replace("-", "−");
  }
  const [mantissa, power] = exponential(value, 1).split("e");
  return `${mantissa.replace("-", "−")}×10${[...String(Number(power))].map((sign) => RAISED[sign]).join("")}`;
}

function nats(value) {
  const size = Math.abs(value);
  if (!(size >= 1e-6 && size < 1e6)) return value === 0 ? "0.000" : figure(value);
  return value.toFixed(size >= 0.00995 ? 3 : 1 - Math.floor(Math.log10(size))).replace("-", "−");
}

function points(share) {
  const hundredths = 100 * share;
  if (!Number.isFinite(hundredths) || Math.abs(hundredths) >= 10000) return figure(hundredths);
  return grouped((Math.round(hundredths * 10) / 10 + 0).toFixed(1), true).replace("-", "−");
}

/** A size with a binary unit. */
export const formatBytes = (size) => (Number.isFinite(size) ? bytes(size) : "–");
/** A count, or a number of so many digits after the point, as the page's language writes it. */
export const formatNumber = (value, digits) =>
  Number.isFinite(value)
    ? value.toLocaleString(lang.value ?? "en", digits === undefined ? {} : { minimumFractionDigits: digits, maximumFractionDigits: digits })
    : "–";
/** A duration in the page's language: 8.2 s, 2 min 5 s. */
export function formatSeconds(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 59.5) return t("page.common.seconds", { seconds: seconds < 9.95 ? seconds.toFixed(1) : seconds.toFixed(0) });
  const minutes = Math.round(seconds / 60);
  if (minutes < 10) {
    const whole = Math.round(seconds);
    return t("page.common.minutes_seconds", { minutes: Math.floor(whole / 60), seconds: whole % 60 });
  }
  if (minutes < 60) return t("page.common.minutes", { minutes });
  return t("page.common.hours", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}
/** How long ago a unix time in seconds was. */
export function formatAge(then) {
  const seconds = Date.now() / 1000 - then;
  if (!Number.isFinite(seconds)) return "–";
  const format = new Intl.RelativeTimeFormat(lang.value ?? "en", { numeric: "auto" });
  for (const [unit, length] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (seconds >= length) return format.format(-Math.floor(seconds / length), unit);
  }
  return t("page.common.just_now");
}

// --- The API -------------------------------------------------------------------------------------------------------

const ROOT = "/api/v1/";

// The address that `tunesmith web` prints may carry the token; it is taken out of sight at once.
function takeToken() {
  const inQuery = new URLSearchParams(location.search);
  const inHash = /[#?&]token=([^&]+)/.exec(location.hash);
  const token = inQuery.get("token") ?? (inHash && decodeURIComponent(inHash[1]));
  if (!token) return kept("token");
  kept("token", token);
  inQuery.delete("token");
  const hash = location.hash.replace(/([#?&])token=[^&]+&?/, "$1").replace(/[?&]$/, "").replace(/^#$/, "");
  history.replaceState(null, "", `${location.pathname}${inQuery.size ? `?${inQuery}` : ""}${hash}`);
  return token;
}
let token = takeToken();
// The printed address may also be entered where the page is open already.
addEventListener("hashchange", () => {
  if (!/[#?&]token=/.test(location.hash)) return;
  takeToken();
  location.reload();
});

/** Give the token that a server beyond this machine asks for. */
export function setToken(value) {
  token = value;
  kept("token", value);
}

/** What the server refused: `status` of HTTP, and `error` with what, where, expected, found, details and next. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.what);
    this.status = status;
    this.error = error;
  }
}

async function request(method, path, { query, body, signal, accept } = {}) {
  const url = new URL((path.startsWith("/") ? "" : ROOT) + path, location.origin);
  for (const [key, value] of Object.entries(query ?? {})) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(key, value);
  }
  const headers = { Accept: accept ?? "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined && body !== null) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(url, { method, headers, signal, body: body == null ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { error: "Unreachable", what: t("page.error.unreachable"), next: t("page.error.unreachable.next") });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const said = await response.json().catch(() => null);
  const error = said?.error ?? { error: "InternalError", what: `${response.status} ${response.statusText}` };
  const known = typeof error === "string" ? { error: "InternalError", what: error } : error;
  return new ApiError(response.status, { ...known, holder: said?.holder ?? known.holder });
}

/** The API under /api/v1: each resolves to the JSON of the answer, or throws ApiError. */
export const api = {
  get: async (path, query, signal) => (await request("GET", path, { query, signal })).json(),
  post: async (path, body, signal) => (await request("POST", path, { body: body ?? {}, signal })).json(),
  delete: async (path) => {
    const answer = await (await request("DELETE", path)).text();
    return answer ? JSON.parse(answer) : null;
  },
  /** A file as a Blob, fetched with the token. */
  blob: async (path, query) => (await request("GET", path, { query, accept: "*/*" })).blob(),
};

/** Fetch a file of the API and hand it to the browser's downloads. */
export async function download(path, filename, query) {
  const url = URL.createObjectURL(await api.blob(path, query));
  const link = Object.assign(document.createElement("a"), { href: url, download: filename });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/**
 * Read server-sent events, of a GET where body is null, else of a POST: onEvent(event, data, id) for each, data parsed.
 * Resolves at the stream's end; throws ApiError where it is refused, AbortError where the signal stops it.
 */
export async function stream(path, body, onEvent, signal) {
  const response = await request(body === null ? "GET" : "POST", path, { body, signal, accept: "text/event-stream" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r\n", "\n");
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) dispatch(block, onEvent);
  }
}

function dispatch(block, onEvent) {
  let event = "message", id = null;
  const data = [];
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") event = value;
    else if (field === "id") id = value;
    else if (field === "data") data.push(value);
  }
  if (data.length) onEvent(event, JSON.parse(data.join("\n")), id);
}

/** Load something whenever its key changes; null loads nothing. Returns {data, error, loading, reload}. */
export function useLoad(key, load) {
  const [state, setState] = useState({ key: null, data: null, error: null });
  const [turn, again] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    if (key === null || key === undefined) return undefined;
    const stop = new AbortController();
    load(stop.signal).then(
      (data) => !stop.signal.aborted && setState({ key, data, error: null }),
      (error) => !stop.signal.aborted && setState({ key, data: null, error }),
    );
    return () => stop.abort();
  }, [key, turn]);
  const fresh = state.key === key;
  return { data: fresh ? state.data : null, error: fresh ? state.error : null, loading: key != null && !fresh, reload: again };
}

// --- The address ---------------------------------------------------------------------------------------------------

function readRoute() {
  const [page, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { page: page || "", query: Object.fromEntries(new URLSearchParams(query ?? "")) };
}
const route = shared(readRoute());
addEventListener("hashchange", () => route.set(readRoute()));

/** Which page the address names, and with what. */
export const useRoute = () => route.use();

/** The address of a page; the run and base at hand go along unless they are given (null leaves them out). */
export function link(page, query = {}) {
  const { run, base } = route.value.query;
  const whole = new URLSearchParams();
  for (const [key, value] of Object.entries({ run, base, ...query })) {
    if (value !== undefined && value !== null && value !== "") whole.set(key, value);
  }
  const said = whole.toString().replaceAll("%2F", "/");
  return `#/${page}${said ? `?${said}` : ""}`;
}

/** Go to a page. */
export const go = (page, query) => {
  location.hash = link(page, query);
};

/** Change what the address of the page at hand says, with no new entry in the history; null takes a key away. */
export function amend(query) {
  const { page, query: now } = readRoute();
  history.replaceState(null, "", link(page, { ...now, ...query }));
  route.set(readRoute());
}

// --- The session and the run ---------------------------------------------------------------------------------------

const session = shared(null);
const lost = shared(null);

/** Facts of the server: root, run, device, what is loaded; null until they are known. */
export const useSession = () => session.use();
/** The error with which the server last failed to answer; null while it does. */
export const useLost = () => lost.use();

// What is free changes all the time; that alone draws nothing anew.
const steady = (facts) => JSON.stringify(facts, (key, value) => (key.endsWith("_free_bytes") || key === "since_s" ? undefined : value));

/** Ask the server again what is loaded and at work. */
export async function refreshSession() {
  try {
    const now = await api.get("session");
    if (steady(now) !== steady(session.value)) session.set(now);
    else Object.assign(session.value, now);
    if (lost.value) lost.set(null);
  } catch (error) {
    lost.set(error);
  }
  return session.value;
}

/** A run as `GET /run` describes it, in the page's language: {data, error, loading, reload}; null loads none. */
export function useRun({ run, base, checkpoint }) {
  const language = useLang();
  const changed = useChanged();
  const key = run ? JSON.stringify([run, base, checkpoint, language, changed]) : null;
  const loaded = useLoad(key, () => readRun(key, { path: run, base, checkpoint, lang: language }));
  const reload = useCallback(() => {
    reads.clear();
    loaded.reload();
  }, [loaded.reload]);
  // While the language changes, what is known stays on the screen.
  const [last, setLast] = useState(null);
  useEffect(() => {
    if (loaded.data) setLast({ run, base, checkpoint, data: loaded.data });
  }, [loaded.data]);
  const same = last && last.run === run && last.base === base && last.checkpoint === checkpoint;
  return { ...loaded, data: loaded.data ?? (same && !loaded.error ? last.data : null), reload };
}

const reads = new Map();
const changes = shared(0);
const useChanged = () => changes.use();
function readRun(key, query) {
  if (!reads.has(key)) {
    if (reads.size > 8) reads.clear();
    const read = api.get("run", query);
    reads.set(key, read);
    // A refusal is kept a moment too, for the others who ask the same.
    read.catch(() => setTimeout(() => reads.get(key) === read && reads.delete(key), 3000));
  }
  return reads.get(key);
}

// --- Jobs ----------------------------------------------------------------------------------------------------------

const jobs = shared([]);
const details = new Map(); // id → {box, readers, stop}
const MOST_DETAILS = 12; // results may be large
const ENDED = new Set(["done", "failed", "cancelled"]);
const WRITES = new Set(["demo", "train", "merge", "quantize", "gguf", "verify", "cleanup"]);

/** Whether a job has come to its end. */
export const ended = (job) => ENDED.has(job?.state);

/** All jobs the server knows, the newest first; kept up to date. */
export const useJobs = () => jobs.use();

/** Ask the server for its jobs again. */
export async function refreshJobs() {
  const { jobs: now } = await api.get("jobs");
  const before = new Map(jobs.value.map((job) => [job.id, job]));
  // What a job wrote is on the disk now, so runs are read again.
  const wrote = now.some((job) => WRITES.has(job.kind) && ended(job) && before.has(job.id) && !ended(before.get(job.id)));
  if (wrote) {
    reads.clear();
    changes.set(changes.value + 1);
  }
  if (JSON.stringify(now) !== JSON.stringify(jobs.value)) jobs.set(now);
  return now;
}

/** Start a job of a kind; resolves to the job. */
export async function startJob(kind, params = {}, { queue = true } = {}) {
  const { job } = await api.post("jobs", { kind, params, queue });
  refreshJobs().then(wake, () => {});
  return job;
}

/** Ask a job to stop; a training saves first. */
export async function cancelJob(id) {
  const { job } = await api.post(`jobs/${id}/cancel`);
  merge(id, job);
  refreshJobs().catch(() => {});
  return job;
}

/** One job, followed as it goes on: null until known, {id, lost: true} where the server has forgotten it. */
export function useJob(id) {
  const [, draw] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    if (!id) return undefined;
    const detail = details.get(id) ?? { job: null, readers: new Set(), after: 0 };
    details.set(id, detail);
    detail.readers.add(draw);
    if (detail.readers.size === 1) follow(id, detail);
    draw();
    return () => {
      detail.readers.delete(draw);
      if (detail.readers.size) return;
      detail.stop?.abort();
      if (details.size > MOST_DETAILS) details.delete(id);
    };
  }, [id]);
  return id ? (details.get(id)?.job ?? null) : null;
}

function merge(id, facts) {
  const detail = details.get(id);
  if (!detail) return;
  detail.job = { log: [], ...detail.job, ...facts };
  for (const draw of [...detail.readers]) draw();
}

// A hidden page lets its stream go, since a browser allows few to one server, and takes it up where it left off.
const inSight = () =>
  document.hidden ? new Promise((seen) => document.addEventListener("visibilitychange", seen, { once: true })).then(inSight) : Promise.resolve();

async function follow(id, detail) {
  const stop = (detail.stop = new AbortController());
  detail.after = 0;
  while (!stop.signal.aborted) {
    try {
      if (!detail.after) await snapshot(id);
      if (ended(detail.job)) return;
      await inSight();
      const once = new AbortController();
      const end = () => once.abort();
      const hide = () => document.hidden && end();
      stop.signal.addEventListener("abort", end);
      document.addEventListener("visibilitychange", hide);
      try {
        await stream(`jobs/${id}/events?after=${detail.after}`, null, (...event) => onJobEvent(id, detail, event), once.signal);
      } finally {
        stop.signal.removeEventListener("abort", end);
        document.removeEventListener("visibilitychange", hide);
      }
      await snapshot(id);
      if (ended(detail.job)) return void refreshJobs().catch(() => {});
    } catch (error) {
      if (stop.signal.aborted) return;
      if (error.status === 404) return merge(id, { id, lost: true, state: "failed", kind: detail.job?.kind });
      if (error.name !== "AbortError") await new Promise((wait) => setTimeout(wait, 1500));
    }
  }
}

async function snapshot(id) {
  const { job } = await api.get(`jobs/${id}`);
  merge(id, job);
}

function onJobEvent(id, detail, [event, data, number]) {
  const fresh = detail.after === 0;
  detail.after = Number(number) || detail.after;
  const log = fresh ? [] : (detail.job?.log ?? []);
  if (event === "progress") merge(id, { progress: data, log });
  else if (event === "log") merge(id, { log: [...log, typeof data === "string" ? data : (data.line ?? data.text)].slice(-500) });
  // The end comes with the whole job, so that nobody sees it done without its result.
  else if (event === "state" && !ENDED.has(data.state)) merge(id, { ...data, log });
  else merge(id, { log });
}

/** The newest job of a kind that is not over, or else null; `fits(job)` may ask for more. */
export function useRunningJob(kind, fits = () => true) {
  const all = useJobs();
  return useMemo(() => all.find((job) => job.kind === kind && !ended(job) && fits(job)) ?? null, [all, kind]);
}

// --- The beginning -------------------------------------------------------------------------------------------------

let wake = () => {};
async function keepUp() {
  for (;;) {
    const busy = jobs.value.some((job) => !ended(job));
    await new Promise((go) => setTimeout((wake = go), busy || lost.value || !session.value?.torch_ready ? 2000 : 8000));
    if (document.hidden) await inSight();
    await Promise.allSettled([refreshSession(), refreshJobs()]);
  }
}

/** Load texts, session and jobs; resolves once the page can be drawn. */
export async function begin() {
  await Promise.all([setLang(firstLang()), refreshSession()]);
  await refreshJobs().catch(() => {});
  keepUp();
}
