// GGUF: a merged model as one file for llama.cpp and Ollama, proved before it is handed on.
import { amend, ended, formatSeconds, html, startJob, t, useState } from "../core.js";
import { Button, Card, Command, ErrorBox, Field, Findings, Icon, Select, TextInput, Toggle, confirmDialog, useKeys } from "../ui.js";
import { ExportJob, PathChoice, useExports, useShownJob } from "./exports.js";
import { inRoot, useKept } from "./variants.js";

const TYPES = {
  full: ["bf16", "f16", "f32", "q8_0"],
  small: ["q5_1", "q5_0", "q4_1", "q4_0"],
  program: ["q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k", "iq4_xs"],
};
const OF_ADAPTERS = ["f32", "f16", "bf16", "q8_0"];
const TONES = { identical: "pass", equal_within_rounding: "pass", different: "fail", not_verified: "skipped" };
const ICONS = { pass: "ok", warn: "warning", fail: "error", skipped: "info" };

/** The tab: a form, then the file and its proof. */
export function Gguf(form) {
  const mine = useExports("gguf", form);
  const job = useShownJob("gguf", form.query, mine.find((one) => !ended(one)));
  return html`
    <${ExportJob} job=${job} name="gguf" title=${t("page.gguf.running")} cancelled=${t("page.gguf.cancelled")} done=${(over) => html`<${Done} job=${over} outcome=${over.result} root=${form.session?.root} />`} />
    ${(!job || ended(job)) && html`<${Form} ...${form} again=${job?.state === "done"} />`}`;
}

const kindOfType = (type) => Object.keys(TYPES).find((kind) => TYPES[kind].includes(type)) ?? "full";

function Form({ run, base, data, query, session, again }) {
  const known = (data.merged || []).filter((one) => one.kind === "model").map((one) => ({ ...one, path: inRoot(one.path, session?.root) }));
  const [own, setOwn] = useKept(`gguf.${run}`, {});
  const form = { what: known.length ? "model" : "adapter", directory: known[0]?.path ?? "", out: "", type: "", ollama: false, verify: true, ...own, ...(query.source ? { what: "model", directory: query.source } : {}) };
  const set = (part) => {
    setOwn((before) => ({ ...before, ...part }));
    if (query.source && ("directory" in part || "what" in part)) amend({ source: null });
  };
  const adapter = form.what === "adapter";
  const saved = data.inspection.run.checkpoints;
  const checkpoint = (saved.find((one) => one.name === query.variant) || saved.at(-1))?.name || "final";
  const types = adapter ? OF_ADAPTERS : Object.values(TYPES).flat();
  const type = types.includes(form.type) ? form.type : types[0];
  const from = (adapter ? `${run}-lora` : form.directory).replace(/[\\/]+$/, "");
  const out = form.out.trim() || `${from}${type === types[0] ? "" : `-${type}`}.gguf`;
  const params = {
    ...(adapter ? { run, adapter_only: true, base: base || null, checkpoint } : { directory: form.directory.trim() }),
    out, type, ollama: !adapter && form.ollama, verify: form.verify ? null : false,
  };
  const [error, setError] = useState(null);
  const there = (data.gguf || []).some((one) => inRoot(one.path, session?.root) === inRoot(out, session?.root));
  const start = async () => {
    const asked = { title: t("page.gguf.replace"), text: t("page.gguf.replace_text", { out }), danger: true, confirm: t("page.merge.replace_go") };
    if (there && !(await confirmDialog(asked))) return;
    startJob("gguf", { ...params, force: there }).then((job) => { setError(null); amend({ job: job.id }); }, setError);
  };
  const ready = adapter || Boolean(form.directory.trim());
  useKeys({ run: ready ? start : null });
  const label = (value) => (hasAbout(value) ? `${value} · ${t(`page.gguf.type.${value}`)}` : `${value} · ${t(`page.gguf.type.${kindOfType(value)}`)}`);
  return html`<${Card} title=${t(again ? "page.gguf.another" : "page.gguf.form")}>
    <${Field} label=${t("page.gguf.what")} hint=${t(`page.gguf.what.${form.what}.about`)}>
      <${Select} testid="gguf-what" value=${form.what} options=${["model", "adapter"].map((value) => ({ value, label: t(`page.gguf.what.${value}`) }))} onchange=${(what) => set({ what })} /><//>
    ${!adapter && html`<${PathChoice} label=${t("page.gguf.directory")} hint=${t("page.gguf.directory_hint")} testid="gguf-directory" value=${form.directory} known=${known} onchange=${(directory) => set({ directory })} />
      ${!known.length && html`<p class="quiet">${t("page.verify.nothing_merged")} <a href="#/merge" onclick=${(event) => { event.preventDefault(); amend({ tab: "merge", job: null }); }}>${t("page.merge.start")}</a></p>`}`}
    <${Field} label=${t("page.gguf.type")} hint=${t(`page.gguf.type.${kindOfType(type)}.about`)}>
      <${Select} testid="gguf-type" value=${type} options=${types.map((value) => ({ value, label: label(value) }))} onchange=${(next) => set({ type: next })} /><//>
    <${Field} label=${t("page.gguf.out")} hint=${t("page.gguf.out_hint")}><${TextInput} mono testid="gguf-out" value=${form.out} placeholder=${out} onchange=${(value) => set({ out: value })} /><//>
    ${!adapter && html`<${Field} label=${t("page.gguf.ollama")} hint=${t("page.gguf.ollama_hint")}><${Toggle} testid="gguf-ollama" value=${form.ollama} onchange=${(ollama) => set({ ollama })} /><//>`}
    <${Field} label=${t("page.gguf.verify")} hint=${t("page.gguf.verify_hint")}><${Toggle} testid="gguf-verify" value=${form.verify} onchange=${(verify) => set({ verify })} /><//>
    ${there && html`<p class="amber" role="status">${t("page.gguf.there", { out })}</p>`}
    <${ErrorBox} error=${error} />
    <div class="start-row"><${Button} kind="primary" testid="gguf-start" disabled=${!ready} onclick=${start}>${t("page.gguf.start")}<//>
      <span class="quiet">${t("page.gguf.atomic")}</span></div>
  <//>`;
}

const NAMED = ["bf16", "f16", "f32", "q8_0", "q4_k_m"];
const hasAbout = (type) => NAMED.includes(type);

const quoted = (path) => (/^[\w./-]+$/.test(path) ? path : `'${path.replaceAll("'", "'\\''")}'`);

/** The lines with which the file is used, as they are typed in the root. */
function linesOf(written, root) {
  const out = inRoot(written.out, root);
  const name = out.split("/").pop().replace(/\.gguf$/, "");
  if (written.adapter) return [`llama-cli -m BASE.gguf --lora ${quoted(out)}`];
  const served = [`llama-server -m ${quoted(out)}`];
  return written.modelfile ? [`ollama create ${quoted(name)} -f ${quoted(inRoot(written.modelfile, root))}`, `ollama run ${quoted(name)}`, ...served] : served;
}

function Done({ job, outcome, root }) {
  const { export: written, verdict } = outcome;
  const good = !verdict || TONES[verdict.answer] === "pass";
  return html`<section class=${good ? "done-card" : "done-card is-doubtful"} data-testid="gguf-done" aria-label=${t("page.gguf.done")}>
    <h2><${Icon} name=${good ? "ok" : "warning"} />${t("page.gguf.done")}</h2>
    <p><bdi class="path">${written.out}</bdi> <span class="quiet">${t("page.gguf.written", { size: written.size_bytes, type: written.type, time: formatSeconds(written.seconds), converter: written.converter })}</span></p>
    ${Object.keys(written.kept).length > 0 && html`<p>${t("page.gguf.kept", { kept: Object.entries(written.kept).map(([kind, count]) => `${count} × ${kind}`).join(", ") })}</p>`}
    ${written.findings.length > 0 && html`<${Findings} findings=${written.findings} />`}
    ${verdict ? html`<${GgufVerdict} verdict=${verdict} />` : html`<p class="amber">${t("page.gguf.unproved")}</p>`}
    ${good && html`<p class="label">${t("page.export.serve")}</p>${linesOf(written, root).map((line) => html`<${Command} key=${line} text=${line} />`)}`}
    ${good && html`<div class="start-row"><${Button} testid="to-push" onclick=${() => amend({ tab: "push", job: null, source: inRoot(written.out, root) })}>${t("page.export.to_push")}<//></div>`}
    <details class="elsewhere"><summary>${t("page.common.command")}</summary><${Command} text=${job.command} /></details>
  </section>`;
}

/** Whether a GGUF file is the model that it was made from: the answer, then what each level found. */
export function GgufVerdict({ verdict }) {
  const tone = TONES[verdict.answer] ?? "skipped";
  const rows = verdict.behaviour || [];
  return html`<section class=${`verdict tone-${tone}`} aria-live="polite">
    <p class="kicker">${t("page.gguf.question", { file: verdict.file, model: verdict.model })}</p>
    <h3 class="verdict-answer" data-testid="gguf-verdict" data-answer=${verdict.answer}><${Icon} name=${ICONS[tone]} />${t(`verdict.${verdict.answer}`)}</h3>
    ${verdict.engine && html`<p class="quiet">${t("page.gguf.engine", { engine: verdict.engine })}</p>`}
    <dl class="facts">${verdict.levels.map((level) => html`<div key=${level.name}><dt>${t(`level.${level.name}`)}<br /><span class=${`state state-${level.status}`}><${Icon} name=${ICONS[level.status]} />${t(`status.${level.status}`)}</span></dt>
      <dd>${level.findings.length > 0 ? html`<${Findings} findings=${level.findings} />` : "–"}
        ${level.name === "behaviour" && rows.length > 0 && html`<p class="quiet">${t("page.gguf.rows", { count: rows.length, kl: Math.max(...rows.map((row) => row.mean_kl)) })}</p>`}</dd></div>`)}</dl>
  </section>`;
}

