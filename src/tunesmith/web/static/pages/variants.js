// Who answers, and how: what Chat and Compare share.
import { amend, html, kept, link, t, useEffect, useJobs, useRef, useState } from "../core.js";
import { Button, ErrorBox, Field, NumberInput, PathInput, Select, TextInput, Toggle } from "../ui.js";

const SETTINGS = "settings";
const LARGEST_SEED = 2 ** 31;

/** A value of this tab that outlives a reload. */
export const recall = (key, otherwise) => {
  try {
    return JSON.parse(kept(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
};

/** Keep a value for as long as the tab lives. */
export const remember = (key, value) => kept(key, JSON.stringify(value));

/** A state that outlives a reload. */
export function useKept(key, initial) {
  const [value, setValue] = useState(() => recall(key, initial));
  const set = (next) =>
    setValue((before) => {
      const after = typeof next === "function" ? next(before) : next;
      remember(key, after);
      return after;
    });
  return [value, set];
}

/** The run that the page's address names, or the one that the server was started with, which the address then names. */
export function useRunOf(query, session) {
  const run = query.run || session?.run || "";
  const base = query.base || (query.run ? "" : session?.base) || "";
  useEffect(() => {
    if (!query.run && run) amend({ run, base });
  }, [query.run, run]);
  return { run, base };
}

/** A path as it is within the root. */
export const inRoot = (path, root) => (root && path?.startsWith(`${root}/`) ? path.slice(root.length + 1) : path)?.replace(/\/+$/, "");

/** The jobs about a run, the newest first, whichever way its path was written. */
export function useJobsOf(run, session) {
  return useJobs().filter((job) => run && inRoot(job.params?.run, session?.root) === inRoot(run, session?.root));
}

/** A variant as replies name it: a directory by its last part. */
export const nameOf = (variant) => (variant.includes("=") ? variant.split("=")[0] : variant.replace(/[\\/]+$/, "").split(/[\\/]/).pop() || variant);

/** All variants that are known of a run: base, checkpoints, complete models. */
export function variantsOf(data) {
  if (!data) return [];
  const run = data.inspection.run;
  const saved = run.checkpoints.map((one) => ({ value: one.name, kind: "adapter", best: one.is_best }));
  const merged = (data.merged || []).map((one) => ({ value: one.path, kind: "full" }));
  return [{ value: "base", kind: "base" }, ...saved.reverse(), ...merged];
}

/** How a variant is listed. */
export const labelOf = (one) => {
  const name = nameOf(one.value);
  const about = one.kind && name !== one.kind ? ` · ${t(`variant.${one.kind}`)}` : "";
  return `${name}${about}${one.best ? ` · ${t("checkpoint.best")}` : ""}`;
};

/** A choice among a run's variants, or of any directory. */
export function VariantSelect({ label, variants, value, onchange, testid }) {
  const known = variants.some((one) => one.value === value);
  const [other, setOther] = useState(false);
  const options = [
    ...variants.map((one) => ({ value: one.value, label: labelOf(one) })),
    ...(known || !value ? [] : [{ value, label: nameOf(value) }]),
    { value: "\n", label: t("page.chat.other_directory") },
  ];
  return html`<div class="variant-choice">
    <${Field} label=${label}>
      <${Select} testid=${testid} value=${other ? "\n" : value} options=${options} onchange=${(next) => {
        setOther(next === "\n");
        if (next !== "\n") onchange(next);
      }} />
    <//>
    ${other && html`<${OtherDirectory} onchoose=${(path) => { setOther(false); onchange(path); }} />`}
  </div>`;
}

/** Any directory of an adapter or a complete model, under the root. */
export function OtherDirectory({ onchoose }) {
  const [path, setPath] = useState("");
  return html`<div class="other-directory">
    <${Field} label=${t("page.chat.directory")} hint=${t("page.chat.directory_hint")}>
      <${PathInput} value=${path} onchange=${setPath} pick="folder" />
    <//>
    <${Button} disabled=${!path.trim()} onclick=${() => onchoose(path.trim())}>${t("page.common.use")}<//>
  </div>`;
}

/** How answers are drawn: kept in the tab, begun from the library's own defaults. */
export function useSettings(session, { key = SETTINGS, ...first } = {}) {
  const [own, setOwn] = useKept(key, {});
  const settings = { ...session?.defaults?.generation, ...first, ...own };
  return [settings, (change) => setOwn((before) => ({ ...before, ...change })), () => setOwn({})];
}

/** Only what the server takes: the settings without what the page adds of its own. */
export const generationOf = ({ system, show_prompt, plain, ...settings }) => settings;

/** The form of generation parameters; `more` shows what only Chat has. */
export function SettingsForm({ settings, change, reset, more = false }) {
  const off = settings.greedy;
  const number = (name, limits, rest = {}) => html`<${Field} label=${t(`page.chat.${name}`)} hint=${rest.hint}>
    <${NumberInput} testid=${`set-${name}`} value=${settings[name]} ...${limits} disabled=${rest.disabled}
      onchange=${(value) => value !== null && change({ [name]: value })} />
  <//>`;
  return html`<div class="settings-form">
    ${more && html`<${Field} label=${t("outputs.system")} hint=${t("page.chat.system_hint")}>
      <${TextInput} rows=${3} value=${settings.system || ""} disabled=${settings.plain} testid="set-system" onchange=${(system) => change({ system })} />
    <//>`}
    ${number("max_new_tokens", { min: 8, max: 8192, integer: true })}
    <${Field} label=${t("page.chat.greedy")} hint=${t("page.chat.greedy_hint")}>
      <${Toggle} value=${!!settings.greedy} onchange=${(greedy) => change({ greedy })} testid="set-greedy" />
    <//>
    <div class="settings-pair">
      ${number("temperature", { min: 0, max: 5 }, { disabled: off })}
      ${number("top_p", { min: 0.01, max: 1 }, { disabled: off })}
      ${number("top_k", { min: 0, max: 1000, integer: true }, { disabled: off })}
      ${number("repetition_penalty", { min: 0.1, max: 5 })}
    </div>
    ${number("seed", { min: 0, max: LARGEST_SEED, integer: true }, { disabled: off, hint: t("page.chat.seed_hint") })}
    ${more && html`
      <${Field} label=${t("page.chat.show_prompt")} hint=${t("page.chat.show_prompt_hint")}>
        <${Toggle} value=${!!settings.show_prompt} onchange=${(show_prompt) => change({ show_prompt })} testid="set-prompt" />
      <//>
      <${Field} label=${t("page.chat.plain")} hint=${t("page.chat.plain_hint")}>
        <${Toggle} value=${!!settings.plain} onchange=${(plain) => change({ plain })} testid="set-plain" />
      <//>`}
    <${Button} onclick=${reset}>${t("page.chat.reset")}<//>
  </div>`;
}

/** Why a reply ended, and how fast it came. */
export function ReplyFoot({ turn }) {
  const cut = turn.stop_reason === "length" || turn.stop_reason === "cancelled";
  return html`<p class=${`reply-foot ${cut ? "is-cut" : ""}`}>
    <span class="stop-reason" data-testid="stop-reason" data-reason=${turn.stop_reason}>${t(`stop.${turn.stop_reason}`)}</span>
    ${turn.tokens !== null && turn.tokens !== undefined && html`<span>${t("outputs.tokens", { tokens: turn.tokens })}</span>`}
    ${turn.tokens_per_s && html`<span>${t("page.chat.speed", { speed: turn.tokens_per_s })}</span>`}
    ${turn.time_to_first_token_s !== null && turn.time_to_first_token_s !== undefined &&
    html`<span>${t("page.chat.first_token", { seconds: turn.time_to_first_token_s })}</span>`}
  </p>`;
}

const HOLDERS = { train: "train", plan_training: "train", compare: "compare", merge: "merge", verify: "verify", report: "report" };

/** Why no answer came; where a job has the model, the way to it. */
export function Refusal({ error }) {
  const { kind, job } = error.holder ?? {};
  return html`<${ErrorBox} error=${error} />
    ${job && html`<p><a href=${link(HOLDERS[kind] ?? "overview", { job })}>${t("page.chat.holder")}</a></p>`}`;
}

/** Weights on their way into memory. */
export function LoadingLine({ progress }) {
  const share = progress?.total ? progress.done / progress.total : null;
  return html`<div class="loading-line" role="status">
    <span>${t("page.chat.loading")}</span>
    <progress max="1" ...${share === null ? {} : { value: share }} aria-label=${t("page.chat.loading")}></progress>
    ${progress?.detail && html`<span class="aside">${progress.detail}</span>`}
  </div>`;
}

/** Marked pieces of a text: `[[kind, text], …]`, kind `same` or `mark`. */
export const Pieces = ({ pieces, role }) =>
  html`<div class="model-text" dir="auto" translate="no">${pieces.map(([kind, text]) =>
    kind === "mark" ? (role === "left" ? html`<del>${text}</del>` : html`<ins>${text}</ins>`) : text)}</div>`;

const MOST_PAIRS = 4e6;
const words = (text) => [...new Intl.Segmenter(undefined, { granularity: "word" }).segment(text)].map((one) => one.segment);

/** What two texts share, word by word, as the server's own diff says it; null where they are too long for it. */
export function wordDiff(left, right) {
  const [a, b] = [words(left), words(right)];
  const width = b.length + 1;
  if ((a.length + 1) * width > MOST_PAIRS) return null;
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      longest[at] = a[i] === b[j] ? longest[at + width + 1] + 1 : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  const segments = [];
  const add = (kind, text) => (segments.at(-1)?.kind === kind ? (segments.at(-1).text += text) : segments.push({ kind, text }));
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    const at = i * width + j;
    if (a[i] === b[j]) {
      add("same", a[i]);
      i += 1;
      j += 1;
    } else if (longest[at + width] >= longest[at + 1]) add("left", a[i++]);
    else add("right", b[j++]);
  }
  if (i < a.length) add("left", a.slice(i).join(""));
  if (j < b.length) add("right", b.slice(j).join(""));
  return segments;
}

/** The share of text in common below which marking single words only confuses. */
export const UNLIKE_BELOW = 0.4;

/** One side of a word diff; where a side was cut, nothing is marked after the last words that both have. */
export function sideOf(segments, side, cut) {
  let compared = segments.length;
  while (cut && compared && segments[compared - 1].kind !== "same") compared -= 1;
  const pieces = [];
  segments.forEach((segment, place) => {
    if (segment.kind === "same" || (segment.kind === side && place >= compared)) pieces.push(["same", segment.text]);
    else if (segment.kind === side) {
      const core = segment.text.trim();
      const [before, after] = core ? [segment.text.slice(0, segment.text.indexOf(core)), segment.text.slice(segment.text.indexOf(core) + core.length)] : [segment.text, ""];
      pieces.push(["same", before], ["mark", core], ["same", after]);
    }
  });
  return pieces.filter((piece) => piece[1]);
}

/** Whether two texts have so little in common that marking single words only confuses. */
export const unlike = (segments) => {
  const length = (kind) => segments.reduce((sum, one) => sum + (one.kind === kind ? one.text.length : 0), 0);
  const same = length("same");
  return 2 * same < UNLIKE_BELOW * (2 * same + length("left") + length("right"));
};

/** An error that came in a stream, as boxes show it. */
export const streamed = (data) => data.error && typeof data.error === "object" ? data.error : data;

/** A text box of several lines; Ctrl or ⌘ with Enter runs. */
export function Writing({ label, value, onchange, onrun, onescape, testid, placeholder, rows = 3, disabled, focused }) {
  const box = useRef(null);
  useEffect(() => {
    if (focused) box.current.focus();
  }, []);
  const pressed = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      event.preventDefault();
      onrun?.();
    } else if (event.key === "Escape" && onescape) {
      event.stopPropagation();
      onescape();
    }
  };
  return html`<textarea class="writing" ref=${box} rows=${rows} aria-label=${label} placeholder=${placeholder} value=${value} disabled=${disabled}
    data-testid=${testid} dir="auto" oninput=${(event) => onchange(event.target.value)} onkeydown=${pressed}></textarea>`;
}

/** Something that lives outside of components, so that neither a change of language nor of page ends it. */
export function outside(value) {
  const readers = new Set();
  return {
    value,
    changed() {
      for (const reader of readers) reader();
    },
    use() {
      const [, redraw] = useState(0);
      useEffect(() => {
        let asked = 0;
        // Many words may come within one frame; one drawing shows them all.
        const reader = () => {
          asked ||= requestAnimationFrame(() => {
            asked = 0;
            redraw((count) => count + 1);
          });
        };
        readers.add(reader);
        return () => {
          readers.delete(reader);
          cancelAnimationFrame(asked);
        };
      }, []);
      return this.value;
    },
  };
}
