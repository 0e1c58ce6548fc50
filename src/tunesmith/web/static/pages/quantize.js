// Quantize: base and adapter become a smaller model in one rounding, in the format that transformers, vLLM and SGLang load.
import { amend, ended, figure, formatSeconds, go, html, startJob, t, useState } from "../core.js";
import { Button, Card, Command, ErrorBox, Field, Findings, Icon, PathInput, Rich, Select, confirmDialog, useKeys } from "../ui.js";
import { ExportJob, Preflight, useExports, useLook, useShownJob } from "./exports.js";
import { inRoot, useKept } from "./variants.js";

export const SCHEMES = ["int8", "int4", "int4:64", "int4:32", "w8a8", "fp8"];
export const ROUNDINGS = ["auto", "faithful", "nearest", "calibrated"];
const VIEWS = ["", "nf4", "nf4-double", "int8"];
const ADAPTER = "adapter:";

/** The tab: a form with what it takes beside it, then the quantization. */
export function Quantize(form) {
  const mine = useExports("quantize", form);
  const job = useShownJob("quantize", form.query, mine.find((one) => !ended(one)));
  return html`
    <${ExportJob} job=${job} name="quantize" title=${t("page.quantize.running")} cancelled=${t("page.quantize.cancelled")} done=${(over) => html`<${Done} job=${over} done=${over.result} root=${form.session?.root} />`} />
    ${(!job || ended(job)) && html`<${Form} ...${form} again=${job?.state === "done"} />`}`;
}

/** Where a quantized model goes unless somewhere else is asked for. */
const proposed = (source, scheme) => `${source.replace(/[\\/]+$/, "").replace(/-merged$/, "")}-${scheme.replace(":", "-")}`;

const FACTS = (plan) => [
  ["page.quantize.layers", t("page.quantize.layers_of", { count: plan.changed, total: plan.tensors }), null],
  ["page.quantize.size", t("page.quantize.size_of", { before: plan.read_bytes, after: plan.write_bytes }), null],
  ["merge.rounding", t(`page.quantize.rounding.${plan.rounding}`), null],
];

function Form({ run, base, data, query, session, again }) {
  const saved = data.inspection.run.checkpoints;
  const whole = (data.merged || []).filter((one) => one.kind === "model");
  const [own, setOwn] = useKept(`quantize.${run}`, {});
  const checkpoint = (saved.find((one) => one.name === query.variant) || saved.at(-1))?.name || "final";
  const first = { source: ADAPTER, base, scheme: "int8", rounding: "auto", calibration: "", view: "", out: "", ...own, ...(query.scheme ? { scheme: query.scheme } : {}) };
  const form = { ...first, source: whole.some((one) => one.path === first.source) ? first.source : ADAPTER };
  const adapter = form.source === ADAPTER;
  const from = adapter ? (checkpoint === "final" ? run : `${run.replace(/[\\/]+$/, "")}-${checkpoint}`) : form.source;
  const out = form.out.trim() || proposed(from, form.scheme);
  const set = (part) => {
    setOwn((before) => ({ ...before, ...part }));
    if (query.scheme && part.scheme) amend({ scheme: null });
  };
  const calibrated = form.rounding === "calibrated";
  const params = {
    ...(adapter ? { run, base: form.base || null, checkpoint, base_view: form.view || null } : { directory: form.source }),
    out, scheme: form.scheme, rounding: form.rounding, calibration: (calibrated && form.calibration.trim()) || null,
  };
  const look = useLook("quantize", params);
  const [error, setError] = useState(null);
  const start = async () => {
    const force = Boolean(look.plan?.preflight.target_not_empty);
    const asked = { title: t("page.merge.replace"), text: t("page.quantize.replace_text", { out }), danger: true, confirm: t("page.merge.replace_go") };
    if (force && !(await confirmDialog(asked))) return;
    startJob("quantize", { ...params, force }).then((job) => { setError(null); amend({ job: job.id }); }, setError);
  };
  const ready = !look.error;
  useKeys({ run: ready ? start : null });
  const sources = [
    ...saved.map((one) => ({ value: `${ADAPTER}${one.name}`, label: t("page.quantize.source.adapter", { name: one.name }) })),
    ...whole.map((one) => ({ value: one.path, label: t("page.quantize.source.model", { name: one.path }) })),
  ];
  const choose = (value) => {
    set({ source: value.startsWith(ADAPTER) ? ADAPTER : value });
    if (value.startsWith(ADAPTER)) amend({ variant: value.slice(ADAPTER.length) });
  };
  return html`<div class="merge-columns">
    <${Card} title=${t(again ? "page.quantize.another" : "page.quantize.form")}>
      <${Field} label=${t("page.quantize.source")} hint=${t(adapter ? "page.quantize.source.once" : "page.quantize.source.twice")}>
        <${Select} testid="quantize-source" value=${adapter ? `${ADAPTER}${checkpoint}` : form.source} options=${sources} onchange=${choose} /><//>
      ${adapter && html`<${Field} label=${t("merge.base")} hint=${t("page.merge.base_hint", { base: data.inspection.run.base_model })}>
        <${PathInput} pick="folder" testid="quantize-base" value=${form.base} placeholder=${data.inspection.run.base_model || ""} onchange=${(value) => set({ base: value })} /><//>
      <${Field} label=${t("page.quantize.view")} hint=${t("page.quantize.view_hint")}>
        <${Select} testid="quantize-view" value=${form.view} options=${VIEWS.map((value) => ({ value, label: t(`page.quantize.view.${value || "stored"}`) }))} onchange=${(view) => set({ view })} /><//>`}
      <${Field} label=${t("page.quantize.scheme")} hint=${t(`page.quantize.scheme.${form.scheme.replace(":", "_")}.about`)}>
        <${Select} testid="quantize-scheme" value=${form.scheme} options=${SCHEMES.map((value) => ({ value, label: t(`page.quantize.scheme.${value.replace(":", "_")}`) }))} onchange=${(scheme) => set({ scheme })} /><//>
      <${RoundingField} form=${form} set=${set} prefix="quantize" />
      <${Field} label=${t("page.merge.out")} hint=${t("page.merge.out_hint")}><${PathInput} pick="folder" testid="quantize-out" value=${form.out} placeholder=${out} onchange=${(value) => set({ out: value })} /><//>
    <//>
    <${Card} title=${t("page.export.preflight")}>
      <${Preflight} look=${look} session=${session} facts=${FACTS} />
      <${ErrorBox} error=${error} />
      <div class="start-row"><${Button} kind="primary" testid="quantize-start" disabled=${!ready} onclick=${start}>${t("page.quantize.start")}<//>
        <span class="quiet">${t("page.merge.atomic")}</span></div>
    <//>
  </div>`;
}

/** How codes are rounded, and on which rows where they are calibrated. */
export function RoundingField({ form, set, prefix }) {
  return html`
    <${Field} label=${t("merge.rounding")} hint=${t(`page.quantize.rounding.${form.rounding}.about`)}>
      <${Select} testid=${`${prefix}-rounding`} value=${form.rounding} options=${ROUNDINGS.map((value) => ({ value, label: t(`page.quantize.rounding.${value}`) }))} onchange=${(rounding) => set({ rounding })} /><//>
    ${form.rounding === "calibrated" && html`<${Field} label=${t("page.quantize.calibration")} hint=${t("page.quantize.calibration_hint")}>
      <${PathInput} testid=${`${prefix}-calibration`} value=${form.calibration} placeholder="rows.jsonl" onchange=${(calibration) => set({ calibration })} /><//>`}`;
}

/** A word as a shell takes it. */
const quoted = (word) => (/^[\w./:-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/** The command that proves a model whose base was seen as the training saw it. */
function proofOf(job, out) {
  const { run, base, checkpoint, base_view } = job.params;
  const rest = [["--base", base], ["--checkpoint", checkpoint === "final" ? null : checkpoint], ["--base-view", base_view]];
  return ["tunesmith", "verify", run, out, ...rest.filter(([, value]) => value).flat()].map(quoted).join(" ");
}

function Done({ job, done, root }) {
  const { plan } = done;
  const out = inRoot(plan.out, root);
  const adapter = plan.adapters[0];
  const about = { ...(adapter ? { variant: adapter.checkpoint } : {}), ...(job.params.base ? { base: job.params.base } : {}) };
  const told = [...plan.warnings, ...done.findings];
  return html`<section class="done-card" data-testid="quantize-done" aria-label=${t("page.quantize.done")}>
    <h2><${Icon} name="ok" />${t("page.quantize.done")}</h2>
    <p><bdi class="path">${plan.out}</bdi> <span class="quiet">${t("page.quantize.written", { size: done.size_bytes, before: plan.read_bytes, time: formatSeconds(done.seconds) })}</span></p>
    <p class="lead"><${Rich} k="page.quantize.sentence" params=${{ scheme: plan.scheme, count: plan.changed, total: plan.tensors, error: done.relative_error }} /></p>
    ${adapter && html`<div class="start-row">
      ${!plan.base_view && html`<${Button} kind="primary" testid="verify-now" onclick=${() => go("verify", { merged: out, ...about })}>${t("page.merge.verify_now")}<//>`}
      <${Button} testid="to-drift" onclick=${() => amend({ tab: "drift", job: null, models: out })}>${t("page.quantize.to_drift")}<//>
      <${Button} testid="to-push" onclick=${() => amend({ tab: "push", job: null, source: out })}>${t("page.export.to_push")}<//></div>
      ${plan.base_view ? html`<p class="label">${t("page.quantize.verify_view")}</p><${Command} text=${proofOf(job, out)} />` : html`<p class="quiet">${t("page.quantize.next")}</p>`}`}
    <dl class="facts">${Object.entries(done.rounded).map(([name, count]) => html`<div key=${name}><dt>${t(`page.quantize.rounded.${name}`)}</dt><dd>${t("page.quantize.rounded_of", { count })}</dd></div>`)}
      <div><dt>${t("merge.relative_error")}</dt><dd>${figure(done.relative_error)}</dd></div></dl>
    ${told.length > 0 && html`<${Findings} findings=${told} />`}
    <p class="label">${t("page.export.serve")}</p><${Command} text=${`vllm serve ${quoted(out)}`} />
    <details class="elsewhere"><summary>${t("page.common.command")}</summary><${Command} text=${job.command} /></details>
  </section>`;
}
