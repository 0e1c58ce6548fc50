// Compare: the same question to several variants, one at a time or many at once, and blind votes over the answers.
import { amend, api, cancelJob, download, ended, formatAge, html, refreshSession, startJob, stream, t, useEffect, useJob, useMemo, useRef, useRun, useState } from "../core.js";
import {
  Button, Card, Command, Empty, ErrorBox, Field, Findings, Loading, NumberInput, Progress, Rich, Select, Tabs, TextInput, confirmDialog, useKeys,
} from "../ui.js";
import { NoRun } from "./chat.js";
import { Evaluate } from "./evaluate.js";
import {
  LoadingLine, OtherDirectory, Pieces, Refusal, ReplyFoot, SettingsForm, Writing, generationOf, labelOf, nameOf, outside, recall, remember,
  useJobsOf, useRunOf, sideOf, streamed, unlike, UNLIKE_BELOW, useKept, useSettings, variantsOf, wordDiff,
} from "./variants.js";

const KEPT = "compared";
const MOST = 4;
const SHOWN_AT_ONCE = 20;
const whole = (text) => (text ? [["same", text]] : []);

/** The page: one question now, many as a job, or votes on what such a job brought. */
export default function Page({ query, session }) {
  const { run, base } = useRunOf(query, session);
  const { data, error } = useRun({ run, base });
  const [settings, change, reset] = useSettings(session, { key: "settings.compare", greedy: true });
  const all = useJobsOf(run, session);
  const jobs = all.filter((job) => job.kind === "compare");
  const evaluations = all.filter((job) => job.kind === "evaluate");
  if (!run) return html`<h1>${t("page.nav.compare")}</h1><${NoRun} />`;
  if (error && !data) return html`<h1>${t("page.nav.compare")}</h1><${ErrorBox} error=${error} />`;
  const known = variantsOf(data);
  const last = known.find((one) => one.value === "final") || known[1];
  const chosen = query.variants ? query.variants.split(",") : query.variant && query.variant !== "base" ? ["base", query.variant] : ["base", last?.value || "final"];
  const tab = query.tab || (query.job ? "many" : "one");
  const job = query.job || jobs[0]?.id;
  const form = html`<details class="settings-fold"><summary>${t("page.chat.parameters")}</summary><${SettingsForm} settings=${settings} change=${change} reset=${reset} /></details>`;
  const shared = { run, base, chosen, settings, change, form };
  return html`<div class="compare-page">
    <h1>${t("page.nav.compare")}</h1>
    <${Tabs} value=${tab} onchange=${(next) => amend({ tab: next })} label=${t("page.nav.compare")}
      tabs=${["one", "many", "effect", "vote"].map((key) => ({ key, title: t(`page.compare.${key}`), testid: `tab-${key}` }))}>
      ${tab !== "vote" && html`<${Chosen} known=${known} chosen=${chosen} onchange=${(next) => amend({ variants: next.join(","), variant: null })} />`}
      ${tab === "one" && html`<${One} ...${shared} />`}
      ${tab === "many" && html`<${Many} ...${shared} job=${job} />`}
      ${tab === "effect" && html`<${Evaluate} run=${run} base=${base} chosen=${chosen} id=${query.evaluation || evaluations[0]?.id} />`}
      ${tab === "vote" && html`<${Votes} job=${job} jobs=${jobs} />`}
    <//>
  </div>`;
}

function Chosen({ known, chosen, onchange }) {
  const [other, setOther] = useState(false);
  const all = [...known, ...chosen.filter((value) => !known.some((one) => one.value === value)).map((value) => ({ value }))];
  const toggle = (value) => onchange(chosen.includes(value) ? chosen.filter((one) => one !== value) : [...chosen, value]);
  return html`<fieldset class="chosen" data-testid="compare-variants">
    <legend>${t("page.compare.variants")}</legend>
    <div class="chips">
      ${all.map((one) => html`<label class="chip" key=${one.value}>
        <input type="checkbox" value=${one.value} checked=${chosen.includes(one.value)} onchange=${() => toggle(one.value)}
          disabled=${chosen.includes(one.value) ? chosen.length <= 1 : chosen.length >= MOST} />
        <span>${labelOf(one)}</span></label>`)}
      <button type="button" class="chip" aria-expanded=${other} disabled=${chosen.length >= MOST} onclick=${() => setOther(!other)}>${t("page.chat.other_directory")}</button>
    </div>
    ${chosen.length < 2 && html`<p class="quiet" role="status">${t("page.compare.one_more")}</p>`}
    ${other && html`<${OtherDirectory} onchoose=${(path) => { setOther(false); if (!chosen.includes(path)) onchange([...chosen, path]); }} />`}
  </fieldset>`;
}

// --- One question --------------------------------------------------------------------------------------------------

const live = outside(recall(KEPT, null));
let controller = null;
if (live.value) live.value.busy = false;

const replyOf = (now, variant) => now.replies[now.variants.findIndex((one) => one === variant || nameOf(one) === variant)];

function received(now, event, data) {
  if (event === "loading") now.loading = data.progress;
  else if (event === "text") {
    now.loading = null;
    replyOf(now, data.variant).text += data.text;
  } else if (event === "reply") {
    Object.assign(replyOf(now, data.variant), { turn: data, text: data.text });
  } else if (event === "done") Object.assign(now, { diffs: data.diffs || [], marks: data.marks || {}, command: data.command });
  else if (event === "error") now.error = streamed(data);
  live.changed();
}

async function ask({ run, base, variants, question, settings }) {
  const now = { run, variants, question, limit: settings.max_new_tokens, replies: variants.map(() => ({ text: "", turn: null })), busy: true, diffs: null, error: null };
  live.value = now;
  controller = new AbortController();
  live.changed();
  const body = { run, base: base || null, variants, messages: [{ role: "user", content: question }], settings: generationOf(settings) };
  try {
    await stream("chat/compare", body, (event, data) => received(now, event, data), controller.signal);
  } catch (error) {
    if (error.name !== "AbortError") now.error = error.error || { error: "InternalError", what: error.message };
  }
  for (const reply of now.replies) if (!reply.turn && !now.error) reply.turn = { stop_reason: "cancelled" };
  Object.assign(now, { busy: false, loading: null });
  remember(KEPT, now);
  live.changed();
  refreshSession();
}

function One({ run, base, chosen, settings, change, form: parameters }) {
  const now = live.use();
  const shown = now?.run === run ? now : null;
  const [question, setQuestion] = useKept("compare.question", "");
  const stop = () => controller?.abort();
  useKeys({ stop: now?.busy ? stop : null });
  const ready = question.trim() && chosen.length > 1 && !now?.busy;
  const start = (changed = {}) => ready && ask({ run, base, variants: chosen, question, settings: { ...settings, ...changed } });
  const twice = () => {
    const max_new_tokens = Math.min(8192, 2 * (shown.limit || settings.max_new_tokens));
    change({ max_new_tokens });
    ask({ run, base, variants: shown.variants, question: shown.question, settings: { ...settings, max_new_tokens } });
  };
  return html`
    <form class="composer" onsubmit=${(event) => { event.preventDefault(); start(); }}>
      <${Writing} testid="compare-input" label=${t("page.chat.question")} placeholder=${t("page.compare.placeholder")} value=${question} onchange=${setQuestion} onrun=${() => start()} />
      <div class="composer-row"><span class="quiet keys">${t("page.compare.keys")}</span>
        ${now?.busy
          ? html`<${Button} kind="danger" testid="compare-stop" onclick=${stop}>${t("page.chat.stop")}<//>`
          : html`<${Button} kind="primary" testid="compare-run" disabled=${!ready} onclick=${() => start()}>${t("page.compare.run")}<//>`}
      </div>
      ${parameters}
    </form>
    ${shown?.loading && html`<${LoadingLine} progress=${shown.loading} />`}
    ${shown?.error && html`<${Refusal} error=${shown.error} />`}
    ${shown ? html`<${Cells} shown=${shown} ontwice=${twice} />` : html`<p class="quiet">${t("page.compare.empty")}</p>`}`;
}

/** What each side shows once all have ended, and what is to be said of their difference. */
function compared(shown) {
  const sides = shown.replies.map((reply) => ({ pieces: whole(reply.text) }));
  const notes = new Map();
  if (!shown.diffs) return { sides, notes: [] };
  const at = (name) => shown.variants.findIndex((one) => one === name || nameOf(one) === name);
  const note = (key, place) => notes.set(key, [...(notes.get(key) ?? []), nameOf(shown.variants[place])]);
  for (const { left, right, segments, similarity } of shown.diffs) {
    const [l, r] = [at(left), at(right)];
    if (l !== 0 || r < 1) continue;
    if (shown.replies[l].text === shown.replies[r].text) {
      note("outputs.same", r);
      continue;
    }
    const cut = [l, r].some((place) => shown.replies[place].turn?.stop_reason === "length");
    if (cut) note("page.compare.not_comparable", r);
    if (similarity < UNLIKE_BELOW) {
      sides[r].unlike = true;
      if (shown.variants.length === 2) sides[l].unlike = true;
      note("outputs.unlike", r);
    } else {
      sides[r] = { pieces: sideOf(segments, "right", cut), role: "right" };
      if (shown.variants.length === 2) sides[l] = { pieces: sideOf(segments, "left", cut), role: "left" };
    }
  }
  return { sides, notes: [...notes].map(([key, rights]) => [key, { left: nameOf(shown.variants[0]), right: rights.join(", ") }]) };
}

function Cells({ shown, ontwice }) {
  const box = useRef(null);
  const { sides, notes } = compared(shown);
  const inStep = (event) => {
    const from = event.currentTarget;
    const span = from.scrollHeight - from.clientHeight;
    // A scroll that this function made itself comes back here; it is then where it should be already.
    for (const other of box.current.querySelectorAll(".cell-text")) {
      const to = span > 0 ? Math.round((from.scrollTop / span) * (other.scrollHeight - other.clientHeight)) : 0;
      if (other !== from && from.matches(":hover, :focus") && Math.abs(other.scrollTop - to) > 1) other.scrollTop = to;
    }
  };
  return html`<section class="compared" aria-label=${t("page.compare.answers")}>
    <p class="asked model-text" dir="auto">${shown.question}</p>
    <div class=${`cells cells-${shown.variants.length}`} ref=${box} aria-live="polite" aria-busy=${shown.busy}>
      ${shown.variants.map((variant, place) => {
        const { text, turn } = shown.replies[place];
        return html`<article key=${variant} class=${`cell ${turn?.stop_reason === "length" ? "is-cut" : ""} ${sides[place].unlike ? `is-unlike-${place ? "right" : "left"}` : ""}`}
          data-testid="compare-cell" data-variant=${variant}>
          <p class="who"><bdi>${nameOf(variant)}</bdi></p>
          <div class="cell-text" tabindex="0" role="region" aria-label=${nameOf(variant)} onscroll=${inStep}>
            ${text ? html`<${Pieces} ...${sides[place]} />` : html`<p class="quiet">${shown.busy ? "…" : t(turn ? "outputs.empty" : "outputs.none")}</p>`}</div>
          ${turn && html`<${ReplyFoot} turn=${turn} />`}
          ${turn?.stop_reason === "length" && html`<div class="amber"><span>${t("page.compare.hit_limit", { limit: shown.limit })}</span>
            <${Button} onclick=${ontwice} disabled=${shown.busy} testid="compare-twice">${t("page.compare.twice")}<//></div>`}
        </article>`;
      })}
    </div>
    ${notes.map(([key, params]) => html`<p class="note">${shown.variants.length > 2 && key === "outputs.unlike" && html`<code>${params.left}</code> / <code>${params.right}</code> – `}<${Rich} k=${key} params=${params} /></p>`)}
    ${shown.command && html`<details class="elsewhere"><summary>${t("page.chat.repeat")}</summary><${Command} text=${shown.command} /></details>`}
  </section>`;
}

// --- Many questions ------------------------------------------------------------------------------------------------

function Many({ run, base, chosen, settings, change, form: parameters, job: id }) {
  const job = useJob(id);
  const [form, setForm] = useKept("compare.many", { source: "held_out", text: "", file: "", rows: 8 });
  const [error, setError] = useState(null);
  const set = (part) => setForm((before) => ({ ...before, ...part }));
  const running = job && !ended(job);
  const start = async (changed = {}) => {
    const own = { prompts_text: form.source === "typed" ? form.text : null, prompts_file: form.source === "file" ? form.file : null };
    try {
      const made = await startJob("compare", { run, base: base || null, variants: chosen, ...own, max_prompts: form.rows, settings: generationOf({ ...settings, ...changed }) });
      setError(null);
      amend({ job: made.id, tab: "many" });
    } catch (problem) {
      setError(problem);
    }
  };
  const ready = chosen.length > 1 && (form.source === "held_out" || (form.source === "typed" ? form.text.trim() : form.file.trim()));
  const sources = ["held_out", "typed", "file"].map((value) => ({ value, label: t(`page.compare.source.${value}`) }));
  return html`
    <div class="batch-form">
      <${Field} label=${t("page.compare.source")} hint=${t(`page.compare.source.${form.source}.hint`)}>
        <${Select} value=${form.source} options=${sources} onchange=${(source) => set({ source })} testid="batch-source" /><//>
      ${form.source === "typed" && html`<${Writing} label=${t("page.compare.source.typed")} rows=${6} value=${form.text} onchange=${(text) => set({ text })} onrun=${() => start()} testid="batch-text" />`}
      ${form.source === "file" && html`<${Field} label=${t("page.compare.source.file")}><${TextInput} mono value=${form.file} placeholder="questions.txt" onchange=${(file) => set({ file })} testid="batch-file" /><//>`}
      ${form.source === "held_out" && html`<${Field} kind="narrow" label=${t("page.compare.rows")}><${NumberInput} min=${1} max=${1000} integer value=${form.rows} onchange=${(rows) => rows && set({ rows })} /><//>`}
      ${parameters}
      <${Button} kind="primary" testid="batch-run" disabled=${!ready || running} onclick=${() => start()}>${t("page.compare.run_many")}<//>
    </div>
    ${error && html`<${ErrorBox} error=${error} />`}
    ${id && (job ? html`<${BatchJob} job=${job} ontwice=${(limit) => {
      change({ max_new_tokens: limit });
      start({ max_new_tokens: limit });
    }} />` : html`<p class="quiet" role="status">${t("page.common.loading")}</p>`)}`;
}

function BatchJob({ job, ontwice }) {
  if (job.lost) return html`<p class="quiet">${t("page.job.lost")}</p>`;
  if (job.state === "failed") return html`<${ErrorBox} error=${job.error} />`;
  if (!ended(job)) return html`<${Running} job=${job} />`;
  if (!job.result) return html`<p class="quiet">${t("page.common.job_cancelled")}</p>`;
  return html`<${Batch} job=${job} comparison=${job.result} ontwice=${ontwice} />`;
}

/** A job at work, with its bar and a way to stop it. */
export function Running({ job, testid, stopid, stop }) {
  // Escape is easily pressed, and this may have worked for hours.
  const ask = async () => (await confirmDialog({ title: t("page.common.stop_ask"), text: t("page.common.stop_ask_text"), danger: true, confirm: t("page.chat.stop") })) && cancelJob(job.id);
  useKeys({ stop: job.cancelling ? null : ask });
  return html`<div class="running" data-testid=${testid}><${Progress} job=${job} />
    <${Button} kind="danger" testid=${stopid} disabled=${job.cancelling} onclick=${() => cancelJob(job.id)}>${job.cancelling ? t("page.common.stopping") : stop || t("page.chat.stop")}<//></div>`;
}

const MARKS = ["different", "truncated", "regressed"];

/** The matrix: a row a question, a cell a variant, with what is to be seen there. */
function rowsOf(comparison) {
  const marks = new Map(comparison.marks.map((row) => [JSON.stringify([row.prompt_id, row.variant]), row]));
  const replies = new Map(comparison.replies.map((reply) => [JSON.stringify([reply.prompt_id, reply.variant]), reply]));
  return comparison.prompts.map((prompt) => {
    const cells = comparison.variants.map((variant) => {
      const key = JSON.stringify([prompt.id, variant.name]);
      const reply = replies.get(key);
      return { variant, reply, marks: marks.get(key) || {} };
    });
    return { prompt, cells, borne: MARKS.filter((mark) => cells.some((cell) => cell.marks[mark])) };
  });
}

function Batch({ job, comparison, ontwice }) {
  const [filter, setFilter] = useState("");
  const [most, setMost] = useState(SHOWN_AT_ONCE);
  const rows = useMemo(() => rowsOf(comparison), [comparison]);
  const count = (mark) => rows.filter((row) => row.borne.includes(mark)).length;
  const shown = filter ? rows.filter((row) => row.borne.includes(filter)) : rows;
  const limit = comparison.settings.max_new_tokens;
  return html`<section class="batch" aria-label=${t("page.compare.answers")}>
    <${Scores} comparison=${comparison} />
    <div class="batch-head">
      <div class="filters" role="group" aria-label=${t("page.compare.filter")}>
        ${["", ...MARKS.filter(count)].map((mark) => html`<button type="button" aria-pressed=${filter === mark} data-filter=${mark} onclick=${() => setFilter(mark)}>
          ${t(`outputs.filter.${mark || "all"}`, { count: mark ? count(mark) : rows.length })}</button>`)}
      </div>
      <div class="downloads" role="group" aria-label=${t("page.common.download")}>
        ${["csv", "jsonl", "html"].map((format) => html`<${Button} onclick=${() => download(`jobs/${job.id}/download`, `comparison.${format}`, { format })}>${format.toUpperCase()}<//>`)}
        <${Button} onclick=${() => amend({ tab: "vote", job: job.id })}>${t("page.compare.vote")}<//>
      </div>
    </div>
    ${count("truncated") > 0 && html`<div class="amber"><span>${t("page.compare.some_cut", { count: count("truncated"), limit })}</span>
      <${Button} onclick=${() => ontwice(Math.min(8192, 2 * limit))}>${t("page.compare.twice")}<//></div>`}
    ${shown.slice(0, most).map((row) => html`<${Exchange} key=${row.prompt.id} ...${row} />`)}
    ${shown.length > most && html`<${Button} onclick=${() => setMost(most + SHOWN_AT_ONCE)}>${t("outputs.more", { count: shown.length - most })}<//>`}
    <details class="elsewhere"><summary>${t("page.common.command")}</summary><${Command} text=${job.command} /></details>
  </section>`;
}

const askedOf = (prompt) => prompt.messages.findLast((turn) => turn.role === "user")?.content ?? "";
const answerTo = (prompt) => (prompt.messages.at(-1)?.role === "assistant" ? prompt.messages.at(-1).content : null);

/** The pieces of each reply of an exchange, marked against the first one's. */
function markedCells(cells) {
  const first = cells[0].reply;
  return cells.map(({ reply }, place) => {
    const other = place ? first : cells.length === 2 ? cells[1].reply : null;
    if (!reply?.text || !other?.text || reply.text === other.text) return { pieces: whole(reply?.text) };
    const [left, right] = place ? [other, reply] : [reply, other];
    const segments = wordDiff(left.text, right.text);
    if (!segments || unlike(segments)) return { pieces: whole(reply.text), unlike: true };
    const cut = [left, right].some((one) => one.stop_reason === "length");
    const role = place ? "right" : "left";
    return { pieces: sideOf(segments, role, cut), role };
  });
}

function Exchange({ prompt, cells, borne }) {
  const [open, setOpen] = useState(false);
  const sides = useMemo(() => (open ? markedCells(cells) : cells.map(({ reply }) => ({ pieces: whole(reply?.text) }))), [open, cells]);
  return html`<article class=${`exchange ${open ? "is-open" : ""}`} data-marks=${borne.join(" ")}>
    <header><span class="id"><bdi>${prompt.id}</bdi></span><h3 class="model-text" dir="auto">${askedOf(prompt)}</h3>
      <button type="button" class="more" aria-expanded=${open} onclick=${() => setOpen(!open)}>${t(open ? "page.compare.less" : "page.compare.whole")}</button></header>
    <div class=${`cells cells-${Math.min(4, cells.length)}`}>
      ${cells.map(({ variant, reply, marks }, place) => html`<section key=${variant.name} class=${`cell ${reply?.stop_reason === "length" ? "is-cut" : ""}`} data-testid="compare-cell">
        <p class="who"><bdi>${variant.name}</bdi>${MARKS.filter((mark) => marks[mark] && mark !== "truncated").map((mark) => html` <span class=${`mark mark-${mark}`}>${t(`mark.${mark}`)}</span>`)}</p>
        <div class="cell-text">${reply?.text ? html`<${Pieces} ...${sides[place]} />` : html`<p class="quiet">${t(reply ? "outputs.empty" : "outputs.none")}</p>`}</div>
        ${reply && html`<${ReplyFoot} turn=${{ stop_reason: reply.stop_reason, tokens: reply.tokens }} />`}
      </section>`)}
    </div>
    ${open && sides.some((side) => side.unlike) && html`<p class="note">${t("outputs.unlike")}</p>`}
    ${open && answerTo(prompt) !== null && html`<div class="reference"><p class="who">${t("outputs.reference")}</p><div class="model-text" dir="auto">${answerTo(prompt)}</div></div>`}
  </article>`;
}

/** Held-out losses with the 95 % intervals of their differences to the base. */
function Scores({ comparison }) {
  const scores = comparison.scores || [];
  if (!scores.length) return html`<section class="effect"><h2>${t("section.effect")}</h2><p class="note">${t("effect.no_scores")}</p></section>`;
  const ends = scores.flatMap((one) => [one.difference_low, one.difference_high]).filter((end) => Number.isFinite(end));
  const [low, high] = [Math.min(0, ...ends), Math.max(0, ...ends)];
  const margin = (high - low || 1) * 0.08;
  const place = (value) => 100 * ((value - low + margin) / (high - low + 2 * margin));
  const answer = answerOf(comparison);
  return html`<section class="effect"><h2>${t("section.effect")}</h2>
    ${answer && html`<p class=${`effect-answer is-${answer.name}`}><strong>${t(`effect.${answer.name}`)}</strong> <${Rich} k=${`effect.${answer.name}.sentence`} params=${answer.params} /></p>`}
    <div class="scroll" tabindex="0"><table class="scores"><thead><tr>${["variant", "probability", "loss", "difference", "interval"].map((name) => html`<th scope="col">${t(`effect.${name}`)}</th>`)}
      <th scope="col" class="plot"><span class="quiet">${ends.length ? t("effect.side") : ""}</span></th><th scope="col">${t("effect.better")}</th></tr></thead>
    <tbody>${scores.map((one) => html`<tr><th scope="row"><bdi>${one.variant}</bdi></th><td>${t("unit.share.value", { value: Math.exp(-one.loss) })}</td><td>${t("unit.nats.value", { value: one.loss })}</td>
      <td>${t("unit.nats.change", { value: one.difference })}</td><td>${Number.isFinite(one.difference_low) ? t("unit.nats.interval", { low: one.difference_low, high: one.difference_high }) : "–"}</td>
      <td class="plot">${ends.length > 0 && html`<${Interval} zero=${place(0)} one=${one} place=${place} />`}</td>
      <td>${Number.isFinite(one.better_rows) ? t("effect.better_of", { better: one.better_rows, rows: one.rows }) : "–"}</td></tr>`)}</tbody></table></div>
    <p class="note">${t("effect.note")}</p></section>`;
}

function Interval({ zero, one, place }) {
  const drawn = Number.isFinite(one.difference_low);
  return html`<svg class="interval" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">
    <line class="zero" x1=${zero} x2=${zero} y1="0" y2="12" />
    ${drawn && html`<line class="range" x1=${place(one.difference_low)} x2=${place(one.difference_high)} y1="6" y2="6" />
      <line class="point" x1=${place(one.difference)} x2=${place(one.difference)} y1="2" y2="10" />`}</svg>`;
}

/** Whether the tuning worked: judged by the last variant that is held against the base. */
function answerOf({ scores, variants }) {
  const one = scores.findLast((each) => Number.isFinite(each.difference)) ?? scores.at(-1);
  const base = scores.find((each) => variants.some((info) => info.name === each.variant && info.kind === "base"));
  const params = { rows: one.rows, variant: one.variant, after: Math.exp(-one.loss) };
  if (!base || !Number.isFinite(one.difference)) return { name: "alone", params };
  const known = Number.isFinite(one.difference_low) && Number.isFinite(one.difference_high);
  const name = known && one.difference_high < 0 ? "yes" : known && one.difference_low > 0 ? "worse" : "unclear";
  return { name, params: { ...params, before: Math.exp(-base.loss), better: one.better_rows || 0 } };
}

// --- Blind votes ---------------------------------------------------------------------------------------------------

const VOTES = [["left", "1"], ["right", "2"], ["tie", "0"], ["skip", "s"], ["undo", "u"]];

function Votes({ job, jobs }) {
  const done = jobs.filter((one) => one.state === "done");
  const id = done.some((one) => one.id === job) ? job : done[0]?.id;
  if (!id) {
    return html`<${Empty} title=${t("page.compare.vote_empty")} hint=${t("page.compare.vote_empty_hint")}
      action=${html`<${Button} kind="primary" onclick=${() => amend({ tab: "many" })}>${t("page.compare.many")}<//>`} />`;
  }
  const label = (one) => `${(one.params.variants || []).map(nameOf).join(" / ")} · ${formatAge(one.ended_s)}`;
  return html`
    ${done.length > 1 && html`<${Field} label=${t("page.compare.vote_which")}><${Select} value=${id} options=${done.map((one) => ({ value: one.id, label: label(one) }))} onchange=${(next) => amend({ job: next })} /><//>`}
    <${Booth} key=${id} job=${id} />`;
}

function Booth({ job }) {
  const [state, setState] = useState(null);
  const [error, setError] = useState(null);
  const busy = useRef(false);
  // One request at a time: a key that is held down is one vote.
  const ask = async (path, body) => {
    if (busy.current) return;
    busy.current = true;
    try {
      setState(await api.post(path, { job, ...body }));
      setError(null);
    } catch (problem) {
      setError(problem);
    }
    busy.current = false;
  };
  useEffect(() => {
    ask("votes/open", {});
  }, [job]);
  const cast = (choice) => ask("votes/cast", { choice, pair: choice === "undo" ? null : state?.pair?.id });
  const can = (choice) => (choice === "undo" ? state?.progress.done > 0 : Boolean(state?.pair));
  const now = useRef({});
  now.current = { cast, can };
  useEffect(() => {
    const pressed = (event) => {
      if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, textarea, select, dialog")) return;
      const vote = VOTES.find(([, key]) => key === event.key.toLowerCase());
      if (vote && now.current.can(vote[0])) now.current.cast(vote[0]);
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
  const reveal = async () => {
    if (await confirmDialog({ title: t("page.compare.vote_reveal"), text: t("page.compare.vote_reveal_text") })) ask("votes/open?reveal=true", {});
  };
  if (!state) return error ? html`<${ErrorBox} error=${error} />` : html`<${Loading} />`;
  const { pair, progress, tally } = state;
  return html`<section class="booth" data-testid="votes" aria-label=${t("page.compare.vote")}>
    ${error && html`<${ErrorBox} error=${error} />`}
    <p class="batch-head"><span role="status">${t("page.compare.vote_of", progress)}</span>
      ${pair && !tally && progress.done > 0 && html`<${Button} onclick=${reveal}>${t("page.compare.vote_reveal")}<//>`}</p>
    ${tally && html`<${Tally} tally=${tally} over=${!pair} path=${state.path} />`}
    ${pair && html`<${Pair} pair=${pair} />`}
    <div class="vote-buttons">${VOTES.filter(([choice]) => pair || choice === "undo").map(([choice, key]) => html`<${Button} kind=${choice === "left" || choice === "right" ? "primary" : "plain"} testid=${`vote-${choice}`}
      disabled=${!can(choice)} onclick=${() => cast(choice)}>${t(`page.compare.vote_${choice}`)} <kbd>${key}</kbd><//>`)}</div>
  </section>`;
}

function Pair({ pair }) {
  const side = (name, title) => html`<section class=${`cell ${pair[name].stop_reason === "length" ? "is-cut" : ""}`}><p class="who">${t(title)}</p>
    <div class="cell-text" tabindex="0" role="region" aria-label=${t(title)}>${pair[name].text.trim() ? html`<div class="model-text" dir="auto" translate="no">${pair[name].text.trim()}</div>` : html`<p class="quiet">${t("outputs.empty")}</p>`}</div>
    ${pair[name].stop_reason === "length" && html`<p class="reply-foot is-cut"><span class="stop-reason">${t("stop.length")}</span></p>`}</section>`;
  const earlier = pair.prompt.slice(0, -1);
  return html`<p class="quiet">${t("page.compare.vote_intro")}</p>
    ${earlier.length > 0 && html`<details><summary>${t("outputs.earlier")}</summary>${earlier.map((turn) => html`<p class="who">${turn.role}</p><div class="model-text" dir="auto">${turn.content}</div>`)}</details>`}
    <p class="asked model-text" dir="auto">${pair.prompt.at(-1)?.content}</p>
    <div class="cells cells-2" key=${pair.id} aria-live="polite">${side("left", "page.compare.vote_first")}${side("right", "page.compare.vote_second")}</div>`;
}

function Tally({ tally, over, path }) {
  return html`<${Card} title=${t(over ? "page.compare.vote_done" : "page.compare.vote_reveal")} testid="vote-tally">
    ${tally.tallies.map((one) => html`<div class="tally"><h3>${t("page.compare.vote_against", one)}</h3>
      <${WinRate} one=${one} />
      <p class="quiet">${t("vote.counts", one)}</p><${Findings} findings=${[one.finding]} /></div>`)}
    ${tally.findings.length > 0 && html`<${Findings} findings=${tally.findings} />`}
    <p class="note"><bdi class="path">${path}</bdi></p>
  <//>`;
}

/** The share of wins with its interval, about the line of a coin. */
function WinRate({ one }) {
  const { value, low, high } = one.win_rate;
  if (!Number.isFinite(value) || !Number.isFinite(low)) return null;
  return html`<svg class="interval interval-wide" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" aria-label=${`${t("unit.share.value", { value })} (${t("unit.share.range", { low, high })})`}>
    <line class="zero" x1="50" x2="50" y1="0" y2="12" /><line class="range" x1=${100 * low} x2=${100 * high} y1="6" y2="6" /><line class="point" x1=${100 * value} x2=${100 * value} y1="2" y2="10" /></svg>`;
}
