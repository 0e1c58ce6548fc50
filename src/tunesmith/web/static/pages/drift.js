// Drift: what merging and quantizing did to the fine-tune, measured against the live adapter, and which model to take.
import { amend, currentLang, ended, formatBytes, html, startJob, t, useState } from "../core.js";
import { Button, Card, Chart, Command, DownloadButton, ErrorBox, Field, Findings, NumberInput, PathInput, Select, Table, Verbatim, useKeys } from "../ui.js";
import { ExportJob, Ticks, kindText, useExports, useShownJob } from "./exports.js";
import { RoundingField, SCHEMES } from "./quantize.js";
import { inRoot, useKept } from "./variants.js";

const FIRST = ["int8", "int4:64", "int4:32"];
const ROWS = 200;

/** The tab: schemes or models to measure, then the table and the advice. */
export function Drift(form) {
  const mine = useExports("drift", form);
  const job = useShownJob("drift", form.query, mine.find((one) => !ended(one)) ?? mine.find((one) => one.state === "done"));
  return html`
    <${ExportJob} job=${job} name="drift" title=${t("page.drift.running")} cancelled=${t("page.drift.cancelled")} done=${(over) => html`<${DriftResult} job=${over} drift=${over.result} />`} />
    ${(!job || ended(job)) && html`<${Form} ...${form} again=${job?.state === "done"} />`}`;
}

function Form({ run, base, data, query, session, again }) {
  const models = (data.merged || []).map((one) => ({ ...one, path: inRoot(one.path, session?.root) }));
  const asked = query.models ? query.models.split(",") : null;
  const [own, setOwn] = useKept(`drift.${run}`, {});
  const form = { what: "schemes", schemes: FIRST, models: models.map((one) => one.path), rounding: "auto", calibration: "", data: "", max_rows: ROWS, ...own, ...(asked ? { what: "models", models: asked } : {}) };
  const set = (part) => {
    setOwn((before) => ({ ...before, ...(asked ? { what: "models", models: asked } : {}), ...part }));
    if (asked) amend({ models: null });
  };
  const saved = data.inspection.run.checkpoints;
  const checkpoint = (saved.find((one) => one.name === query.variant) || saved.at(-1))?.name || "final";
  const [error, setError] = useState(null);
  const makes = form.what === "schemes";
  const known = models.map((one) => one.path);
  const chosen = form.models.filter((path) => known.includes(path));
  const params = {
    run, base: base || null, checkpoint, data: form.data.trim() || null, max_rows: form.max_rows,
    ...(makes ? { schemes: form.schemes, rounding: form.rounding, calibration: (form.rounding === "calibrated" && form.calibration.trim()) || null } : { directories: chosen }),
  };
  const ready = makes ? form.schemes.length > 0 : chosen.length > 0;
  const start = () => startJob("drift", params).then((job) => { setError(null); amend({ job: job.id }); }, setError);
  useKeys({ run: ready ? start : null });
  return html`<${Card} title=${t(again ? "page.drift.again" : "page.drift.form")}>
    <${Field} label=${t("page.drift.what")} hint=${t(`page.drift.what.${form.what}.about`)}>
      <${Select} testid="drift-what" value=${form.what} options=${["schemes", "models"].map((value) => ({ value, label: t(`page.drift.what.${value}`) }))} onchange=${(what) => set({ what })} /><//>
    ${makes
      ? html`<${Ticks} legend=${t("page.quantize.scheme")} testid="drift-schemes" options=${SCHEMES.map((value) => ({ value }))} value=${form.schemes} onchange=${(schemes) => set({ schemes })} about=${t("page.drift.schemes_hint")} />
          <${RoundingField} form=${form} set=${set} prefix="drift" />`
      : models.length
        ? html`<${Ticks} legend=${t("page.drift.models")} testid="drift-models" options=${models.map((one) => ({ value: one.path, label: `${one.path} · ${kindText(one)}` }))} value=${chosen} onchange=${(next) => set({ models: next })} />`
        : html`<p class="quiet">${t("page.drift.no_models")}</p>`}
    <div class="field-pair">
      <${Field} label=${t("page.drift.data")} hint=${t("page.drift.data_hint")}><${PathInput} testid="drift-data" value=${form.data} placeholder="rows.jsonl" onchange=${(rows) => set({ data: rows })} /><//>
      <${Field} label=${t("page.drift.max_rows")} hint=${t("page.drift.max_rows_hint")}><${NumberInput} testid="drift-rows" integer min=${2} max=${100000} value=${form.max_rows} onchange=${(rows) => set({ max_rows: rows ?? ROWS })} /><//>
    </div>
    <${ErrorBox} error=${error} />
    <div class="start-row"><${Button} kind="primary" testid="drift-start" disabled=${!ready} onclick=${start}>${t("page.drift.start")}<//>
      <span class="quiet">${t(makes ? "page.drift.leaves_nothing" : "page.drift.one_at_a_time")}</span></div>
  <//>`;
}

const figureOf = (unit, estimate) =>
  estimate === null || estimate === undefined
    ? "–"
    : html`<span class="figure">${t(`unit.${unit}.value`, estimate)}${estimate.low !== null && estimate.high !== null && html`<span class="range">${t(`unit.${unit}.range`, estimate)}</span>`}</span>`;

function tagOf(drift, row) {
  const tag = row.model.kind === "base" ? "yardstick" : row.model.name === drift.recommended ? "recommended" : row.close ? "close" : null;
  return tag && html` <span class=${tag === "recommended" ? "tag tag-good" : tag === "close" ? "tag" : "quiet"}>${t(`drift.tag.${tag}`)}</span>`;
}

/** The advice, the table, the picture, and what is to be known of the figures. */
export function DriftResult({ job, drift }) {
  const answers = drift.in_domain_rows > 0;
  const first = (row) => row.in_domain ?? row.general;
  const number = (key, unit, read) => ({ key, title: t(`drift.column.${key}`), numeric: true, render: (row) => figureOf(unit, read(row)) });
  const columns = [
    { key: "model", title: t("drift.column.model"), render: (row) => html`<${Verbatim}>${row.model.name}<//>${tagOf(drift, row)}` },
    { key: "scheme", title: t("drift.column.scheme"), render: (row) => html`<${Verbatim}>${[row.model.scheme, row.model.rounding].filter(Boolean).join(" · ")}<//>` },
    { key: "size", title: t("drift.column.size"), numeric: true, render: (row) => html`<span class="figure">${formatBytes(row.model.size_bytes)}<span class="range">${t("drift.of_bf16", { ratio: row.size_ratio })}</span></span>` },
    ...(answers ? [number("kept", "share", (row) => row.kept), number("kl_in", "nats", (row) => row.in_domain?.kl)] : []),
    number("kl_out", "nats", (row) => row.general?.kl),
    number("top1", "share", (row) => first(row)?.top1),
  ];
  const sets = drift.rows.flatMap((row) => [["in_domain", row.in_domain], ["general", row.general]].filter(([, one]) => one).map(([name, one]) => ({ key: `${row.model.name} ${name}`, row, name, one })));
  const spec = drift.charts?.[currentLang()];
  const path = `jobs/${job.id}/download`;
  const again = drift.recommended && !drift.rows.find((row) => row.model.name === drift.recommended)?.model.path ? drift.recommended.split(" ")[0] : null;
  return html`<section class="drift" data-testid="drift-done" aria-label=${t("section.drift")}>
    <div class="batch-head"><h2>${t("section.drift")}</h2>
      <div class="downloads">${["html", "md", "json"].map((format) => html`<${DownloadButton} key=${format} path=${path} query=${{ format }} filename=${`drift.${format}`} testid=${`drift-${format}`}>${format.toUpperCase()}<//>`)}</div></div>
    <${Findings} findings=${drift.findings} testid="drift-advice" />
    ${again && html`<div class="start-row"><${Button} kind="primary" testid="drift-take" onclick=${() => amend({ tab: "quantize", job: null, scheme: again })}>${t("page.drift.take", { scheme: again })}<//></div>`}
    <div class="card stack"><${Table} testid="drift-table" label=${t("section.drift")} rows=${drift.rows.map((row) => ({ key: row.model.name, ...row }))} columns=${columns} rowClass=${(row) => (row.model.name === drift.recommended ? "is-best" : "")} /></div>
    ${spec && html`<${Chart} spec=${spec} testid="drift-chart" label=${t("chart.drift.label")} /><p class="note">${t("chart.drift.caption")}</p>`}
    <details><summary>${t("drift.details")}</summary>
      <div class="card stack"><${Table} label=${t("drift.details")} rows=${sets} columns=${[
        { key: "model", title: t("drift.column.model"), render: ({ row }) => html`<${Verbatim}>${row.model.name}<//>` },
        { key: "texts", title: t("drift.column.texts"), render: ({ name }) => t(`drift.texts.${name}`) },
        { key: "kl", title: t("drift.column.kl"), numeric: true, render: ({ one }) => figureOf("nats", one.kl) },
        { key: "p99", title: t("drift.column.p99"), numeric: true, render: ({ one }) => figureOf("nats", one.p99) },
        { key: "top1", title: t("drift.column.top1"), numeric: true, render: ({ one }) => figureOf("share", one.top1) },
      ]} /></div></details>
    <details class="elsewhere"><summary>${t("page.drift.notes")}</summary>${notesOf(drift).map((note) => html`<p class="note">${note}</p>`)}</details>
    <${Command} text=${job.command} label=${t("page.common.command")} />
  </section>`;
}

const notesOf = (drift) => [
  t(`drift.note.rows.${drift.rows_from}`, { rows: drift.in_domain_rows, tokens: drift.in_domain_tokens, texts: drift.general_rows, general: drift.general_tokens, dtype: drift.dtype }),
  t("drift.note.figures"),
  t(`drift.note.intervals.${drift.comparisons > 1 ? "several" : "one"}`, { models: drift.comparisons }),
  t("drift.note.rule", { kept: drift.kept_at_least, kl: drift.kl_at_most }),
];
