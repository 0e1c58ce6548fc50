// The pieces that all pages are made of. Whatever a model or a file said is only ever put in as a text node.
import {
  api, cancelJob, createContext, currentLang, download, ended, figure, fill, formatBytes, formatNumber, formatSeconds, hasText, html,
  link, render, sentence, t, template, useContext, useEffect, useErrorBoundary, useJob, useLang, useLayoutEffect, useLoad, useMemo,
  useRef, useState,
} from "./core.js";

const PATHS = {
  fork: "M7.5 2.5v8a4.5 4.5 0 0 0 9 0v-8M12 15v6.5",
  open: "M3 6.5h6l2 2.500h10v10.500H3z",
  overview: "M4 4h7v9H4zM13 4h7v5h-7zM13 11h7v9h-7zM4 15h7v5H4z",
  train: "M3 20h18M5 16l4.500-6 4 3.500L20 5",
  chat: "M4 5h16v11h-9l-4.500 4V16H4z",
  compare: "M4 4h7v16H4zM13 4h7v16h-7z",
  merge: "M6 4v4c0 4 6 4 6 8v4M18 4v4c0 4-6 4-6 8M9 17l3 3 3-3",
  verify: "M12 3l8 3v6c0 5-3.500 7.500-8 9-4.500-1.500-8-4-8-9V6zM8.500 12l2.500 2.500 4.500-5",
  report: "M6 3h8l4 4v14H6zM14 3v4h4M9 12h6M9 16h6",
  ok: "M12 2.750a9.250 9.250 0 1 0 0 18.500 9.250 9.250 0 0 0 0-18.500M7.800 12.400l2.900 2.900 5.600-6",
  info: "M12 2.750a9.250 9.250 0 1 0 0 18.500 9.250 9.250 0 0 0 0-18.500M12 11v5.500M12 7.600v.2",
  warning: "M12 3.200 22 20.600H2zM12 9.800v5M12 17.600v.2",
  error: "M8 2.800h8L21.200 8v8L16 21.200H8L2.800 16V8zM8.800 8.800l6.400 6.400m0-6.400-6.400 6.400",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2.500M12 19.500V22M2 12h2.500M19.500 12H22M5 5l1.700 1.700M17.300 17.300 19 19M19 5l-1.700 1.700M6.700 17.300 5 19",
  moon: "M20 14.500A8.500 8.500 0 0 1 9.500 4 8.500 8.500 0 1 0 20 14.500z",
  auto: "M12 2.750a9.250 9.250 0 1 0 0 18.500 9.250 9.250 0 0 0 0-18.500M12 3v18M12 7h7M12 11h9M12 15h8",
  copy: "M8 8h12v12H8zM4 16V4h12",
  folder: "M3 6.500h6l2 2.500h10v10.500H3z",
  up: "M12 20V5M6 11l6-6 6 6",
  next: "M9 5l7 7-7 7",
  close: "M6 6l12 12M18 6 6 18",
  stop: "M6 6h12v12H6z",
};

/** A small drawing beside words; it says nothing by itself. */
export const Icon = ({ name }) =>
  html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false"><path d=${PATHS[name] ?? PATHS.info} /></svg>`;

let counted = 0;
const useUnique = (prefix = "f") => useMemo(() => `${prefix}${++counted}`, []);

/** A text with what stands between backticks as code; `k` is its key. */
export function Rich({ k, params = {}, text }) {
  useLang();
  const parts = (text ?? template(k) ?? k).split("`");
  return html`${parts.map((part, place) => (place % 2 ? html`<code translate="no">${fill(part, params)}</code>` : fill(part, params)))}`;
}

/** A name from outside: a path, a model, a token; never translated, its direction kept to itself. */
export const Verbatim = ({ children, title }) => html`<bdi class="verbatim" translate="no" title=${title}>${children}</bdi>`;

// --- Boxes ---------------------------------------------------------------------------------------------------------

/** A bordered box with an optional title and buttons beside it. */
export function Card({ title, actions, children, testid, kind = "" }) {
  return html`<section class="card ${kind}" data-testid=${testid}>
    ${(title || actions) && html`<header class="card-head">${title ? html`<h2>${title}</h2>` : html`<span></span>`}${actions && html`<div class="actions">${actions}</div>`}</header>`}
    ${children}
  </section>`;
}

/** A button; with href a link that looks like one. */
export function Button({ kind = "plain", onclick, disabled, testid, href, children, title, type = "button", label }) {
  const common = { class: `button button-${kind}`, "data-testid": testid, title, "aria-label": label };
  if (href && !disabled) return html`<a ...${common} href=${href}>${children}</a>`;
  return html`<button ...${common} type=${type} disabled=${disabled} onclick=${onclick}>${children}</button>`;
}

/** What is shown where there is nothing yet: a title, a hint and what to do. */
export const Empty = ({ title, hint, action }) =>
  html`<div class="empty-state">
    <p class="empty-title">${title}</p>
    ${hint && html`<p class="quiet">${hint}</p>`}
    ${action && html`<div class="actions">${action}</div>`}
  </div>`;

/** Work that has begun and says nothing of how far it is. */
export const Loading = ({ text }) => html`<p class="loading" role="status"><span class="spinner" aria-hidden="true"></span>${text ?? t("page.common.loading")}</p>`;

/** An error: what, where, expected, found, details and the next step; of an exception of ours only what it says. */
export function ErrorBox({ error, testid = "error", retry }) {
  useLang();
  if (!error) return null;
  const said = error.error && typeof error.error === "object" ? error.error : error.what ? error : { error: "InternalError", what: String(error.message ?? error) };
  const title = hasText(`page.error.${said.error}`) ? t(`page.error.${said.error}`) : t("page.error.other");
  const lines = [["where", said.where], ["expected", said.expected], ["found", said.found], ["next", said.next]].filter(([, value]) => value);
  return html`<div class="error-box" role="alert" data-testid=${testid}>
    <p class="error-title"><${Icon} name="error" />${title}</p>
    <p class="error-what">${sentence(said.what)}</p>
    ${said.details?.length > 0 && html`<ul class="error-details">${said.details.map((line) => html`<li>${line}</li>`)}</ul>`}
    ${lines.length > 0 && html`<dl>${lines.map(([name, value]) => html`<div><dt>${t(`page.error.${name}`)}</dt><dd>${value}</dd></div>`)}</dl>`}
    ${retry && html`<div class="actions"><${Button} onclick=${retry}>${t("page.common.retry")}<//></div>`}
  </div>`;
}

/** Shows an ErrorBox in place of a part of the page that fell. */
export function Guard({ children }) {
  const [error, reset] = useErrorBoundary();
  return error ? html`<${ErrorBox} error=${error} retry=${reset} />` : children;
}

// --- Forms ---------------------------------------------------------------------------------------------------------

const FieldContext = createContext(null);
const useField = () => useContext(FieldContext) ?? {};

/** A labelled input: label, hint and error belong to the input inside. */
export function Field({ label, hint, error, children, kind = "" }) {
  const id = useUnique();
  const described = [hint && `${id}-hint`, error && `${id}-error`].filter(Boolean).join(" ") || undefined;
  return html`<div class="field ${kind}">
    <label for=${id}>${label}</label>
    <${FieldContext.Provider} value=${{ id, described, invalid: Boolean(error) }}>${children}<//>
    ${hint && html`<p class="hint-line" id=${`${id}-hint`}>${hint}</p>`}
    ${error && html`<p class="field-error" id=${`${id}-error`}>${error}</p>`}
  </div>`;
}

const inputProps = (field, { testid, disabled, label }) => ({
  id: field.id, "aria-describedby": field.described, "aria-invalid": field.invalid || undefined, "aria-label": label,
  "data-testid": testid, disabled,
});

/** One line of text, or with rows several; onchange(text) at every key. */
export function TextInput({ value, onchange, testid, placeholder, rows, disabled, label, onenter, mono, list }) {
  const field = useField();
  const props = { ...inputProps(field, { testid, disabled, label }), placeholder, spellcheck: false, autocomplete: "off" };
  const input = (event) => onchange(event.target.value);
  if (rows) return html`<textarea ...${props} class=${mono ? "mono" : ""} rows=${rows} value=${value ?? ""} oninput=${input}></textarea>`;
  const keydown = (event) => onenter && event.key === "Enter" && !event.isComposing && onenter();
  return html`<input type="text" ...${props} class=${mono ? "mono" : ""} list=${list} value=${value ?? ""} oninput=${input} onkeydown=${keydown} />`;
}

/** A number, or null where the box is empty; what is typed stays as typed while it means the same. */
export function NumberInput({ value, onchange, testid, min, max, integer, placeholder, disabled, label }) {
  const field = useField();
  const [typed, setTyped] = useState(null);
  const meant = (text) => (text.trim() === "" ? null : Number(text));
  const wrong = (number) => number !== null && (!Number.isFinite(number) || (integer && !Number.isInteger(number)) || number < min || number > max);
  const shown = typed !== null && (meant(typed) === (value ?? null) || wrong(meant(typed))) ? typed : (value ?? "");
  const input = (event) => {
    const number = meant(event.target.value);
    setTyped(event.target.value);
    if (!wrong(number)) onchange(number);
  };
  const props = inputProps({ ...field, invalid: field.invalid || (typed !== null && wrong(meant(typed))) }, { testid, disabled, label });
  return html`<input type="text" inputmode="decimal" autocomplete="off" ...${props} placeholder=${placeholder} value=${shown} oninput=${input} onblur=${() => setTyped(null)} />`;
}

/** A choice of options: strings, or [value, label] pairs, or {value, label}. */
export function Select({ value, onchange, options, testid, disabled, label }) {
  const field = useField();
  const list = options.map((option) => (Array.isArray(option) ? { value: option[0], label: option[1] } : typeof option === "object" && option ? option : { value: option, label: option }));
  const change = (event) => onchange(list[event.target.selectedIndex].value);
  return html`<select ...${inputProps(field, { testid, disabled, label })} onchange=${change}>
    ${list.map((option) => html`<option value=${String(option.value)} selected=${option.value === value} disabled=${option.disabled}>${option.label}</option>`)}
  </select>`;
}

/** A switch: on or off. */
export function Toggle({ value, onchange, testid, disabled, label }) {
  const field = useField();
  return html`<label class="toggle"><input type="checkbox" role="switch" ...${inputProps(field, { testid, disabled })} checked=${Boolean(value)} onchange=${(event) => onchange(event.target.checked)} /><span class="toggle-track" aria-hidden="true"></span>${label && html`<span>${label}</span>`}</label>`;
}

/** A number on a track, its value shown. */
export function Slider({ value, onchange, min = 0, max = 1, step = 0.01, testid, disabled, label, format = String }) {
  const field = useField();
  return html`<span class="slider"><input type="range" ...${inputProps(field, { testid, disabled, label })} min=${min} max=${max} step=${step} value=${value} aria-valuetext=${format(value)} oninput=${(event) => onchange(Number(event.target.value))} /><output>${format(value)}</output></span>`;
}

/** A path under the root: typed, or picked in a browser of folders; `pick` says what may be picked. */
export function PathInput({ value, onchange, pick = "folder", testid, placeholder, onenter, disabled, label }) {
  const browse = async () => {
    const chosen = await browseFolders({ start: value, pick });
    if (chosen !== null) onchange(chosen);
  };
  return html`<span class="path-input">
    <${TextInput} mono value=${value} onchange=${onchange} testid=${testid} placeholder=${placeholder} onenter=${onenter} disabled=${disabled} label=${label} />
    <${Button} onclick=${browse} disabled=${disabled} title=${t("page.common.browse")}><${Icon} name="folder" /><span class="wide-only">${t("page.common.browse")}</span><//>
  </span>`;
}

function Folders({ start, pick, done }) {
  const [path, setPath] = useState(start || "");
  const { data, error, loading } = useLoad(path, () =>
    api.get("folders", { path }).catch((failure) => (path === start && path ? api.get("folders", { path: "" }) : Promise.reject(failure))),
  );
  const open = (folder) => (pick === "run" && folder.is_run ? done(folder.path) : setPath(folder.path));
  return html`
    <p class="folder-here"><${Verbatim}>${data?.path ?? path}<//></p>
    <${ErrorBox} error=${error} />
    ${loading && html`<${Loading} />`}
    ${data && html`<ul class="folders">
      ${data.parent !== null && html`<li><button type="button" onclick=${() => setPath(data.parent)}><${Icon} name="up" />${t("page.common.up")}</button></li>`}
      ${data.folders.map((folder) => html`<li key=${folder.path}><button type="button" onclick=${() => open(folder)}>
        <${Icon} name=${folder.is_run ? "train" : "folder"} /><${Verbatim}>${folder.name}<//>${folder.is_run && html`<span class="tag">${t("page.common.run")}</span>`}
      </button></li>`)}
      ${!data.folders.length && html`<li class="quiet">${t("page.common.no_folders")}</li>`}
    </ul>
    ${data.truncated && html`<p class="note">${t("page.common.truncated")}</p>`}`}
    <div class="actions actions-end">
      <${Button} onclick=${() => done(null)}>${t("page.common.cancel")}<//>
      <${Button} kind="primary" disabled=${!data} onclick=${() => done(data.path)}>${t("page.common.use_folder")}<//>
    </div>`;
}

const browseFolders = ({ start, pick }) =>
  openDialog(t(pick === "run" ? "page.common.pick_run" : "page.common.pick_folder"), (done) => html`<${Folders} start=${start} pick=${pick} done=${done} />`, null);

/** Open a dialog; `content(done)` is what it holds, and done(value) closes it. Resolves to the value. */
export function openDialog(title, content, otherwise = null) {
  return new Promise((resolve) => {
    const dialog = document.createElement("dialog");
    const id = `d${++counted}`;
    dialog.setAttribute("aria-labelledby", id);
    let value = otherwise;
    const done = (chosen) => {
      value = chosen;
      dialog.close();
    };
    dialog.addEventListener("close", () => {
      render(null, dialog);
      dialog.remove();
      resolve(value);
    });
    document.body.append(dialog);
    render(html`<div class="dialog"><h2 id=${id}>${title}</h2>${content(done)}</div>`, dialog);
    dialog.showModal();
  });
}

/** Ask before something that cannot be undone; resolves to whether to go on. */
export const confirmDialog = ({ title, text, danger, confirm, children }) =>
  openDialog(
    title,
    (done) => html`
      ${text && html`<p>${text}</p>`}
      ${children}
      <div class="actions actions-end">
        <${Button} onclick=${() => done(false)} testid="dialog-cancel">${t("page.common.cancel")}<//>
        <${Button} kind=${danger ? "danger" : "primary"} onclick=${() => done(true)} testid="dialog-confirm">${confirm ?? t("page.common.confirm")}<//>
      </div>`,
    false,
  );

/** Ctrl/⌘-Enter runs and Esc stops, wherever the focus is; a dialog keeps its own keys. */
export function useKeys({ run, stop }) {
  const now = useRef({});
  now.current = { run, stop };
  useEffect(() => {
    const press = (event) => {
      if (event.isComposing || document.querySelector("dialog[open]")) return;
      const act = event.key === "Enter" && (event.ctrlKey || event.metaKey) ? now.current.run : event.key === "Escape" ? now.current.stop : null;
      if (!act) return;
      event.preventDefault();
      act();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, []);
}

// --- Data ----------------------------------------------------------------------------------------------------------

/** A table; a column's render(row) gives its cell, numeric ones stand to the right. */
export function Table({ columns, rows, testid, caption, rowClass, label }) {
  const cell = (column, row, first) => {
    const content = column.render ? column.render(row) : row[column.key];
    const kind = column.numeric ? "numeric" : (column.kind ?? "");
    return first
      ? html`<th scope="row" class=${kind}>${content ?? "–"}</th>`
      : html`<td class=${kind} data-label=${typeof column.title === "string" ? column.title : undefined}>${content ?? "–"}</td>`;
  };
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label ?? (typeof caption === "string" ? caption : t("page.common.table"))}>
    <table data-testid=${testid}>
      ${caption && html`<caption>${caption}</caption>`}
      <thead><tr>${columns.map((column) => html`<th scope="col" class=${column.numeric ? "numeric" : (column.kind ?? "")}>${column.title}</th>`)}</tr></thead>
      <tbody>${rows.map((row, place) => html`<tr key=${row.key ?? place} class=${rowClass?.(row)}>${columns.map((column, at) => cell(column, row, at === 0))}</tr>`)}</tbody>
    </table>
  </div>`;
}

/** Labels and values, one a line: [{label, value, about}]. */
export const Facts = ({ facts }) =>
  html`<dl class="facts">${facts.map((fact) => html`<div key=${fact.key ?? fact.label}><dt>${fact.label}</dt><dd>${fact.value}${fact.about && html`<span class="about">${fact.about}</span>`}</dd></div>`)}</dl>`;

const findingKey = ({ code, params }) => {
  const special = `finding.${code}.${params?.about}`;
  return hasText(special) ? special : hasText(`finding.${code}`) ? `finding.${code}` : null;
};

/** A finding's sentence in the language of the page, remedy and all. */
export function FindingText({ finding }) {
  useLang();
  const key = findingKey(finding);
  return key ? html`<${Rich} k=${key} params=${finding.params} />` : html`<code>${finding.code}</code> ${JSON.stringify(finding.params ?? {})}`;
}

/** What was found, the gravest first as the server sends it. */
export const Findings = ({ findings, testid }) =>
  html`<ul class="findings" data-testid=${testid}>${(findings ?? []).map((finding) => html`<li class=${`finding-${finding.severity}`}><${Icon} name=${finding.severity} /><span class="unseen">${t(`severity.${finding.severity}`)}: </span><span><${FindingText} finding=${finding} /></span></li>`)}</ul>`;

/** Tabs: {key, title} each; arrow keys move between them. */
export function Tabs({ tabs, value, onchange, testid, label, children }) {
  const id = useUnique("t");
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = tabs.findIndex((tab) => tab.key === value);
    const next = (at + step + tabs.length) % tabs.length;
    onchange(tabs[next].key);
    event.currentTarget.children[next].focus();
  };
  return html`<div class="tabs">
    <div role="tablist" aria-label=${label} data-testid=${testid} onkeydown=${move}>${tabs.map((tab) => html`<button type="button" role="tab" id=${`${id}-${tab.key}`} aria-selected=${tab.key === value} aria-controls=${`${id}-panel`} tabindex=${tab.key === value ? 0 : -1} data-testid=${tab.testid} onclick=${() => onchange(tab.key)}>${tab.title}</button>`)}</div>
    ${children && html`<div role="tabpanel" id=${`${id}-panel`} aria-labelledby=${`${id}-${value}`}>${children}</div>`}
  </div>`;
}

/** A command line that can be copied. */
export function Command({ text, label, testid }) {
  const [copied, setCopied] = useState(false);
  if (!text) return null;
  const copy = async () => {
    await copyText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 2000);
  };
  return html`<div class="command">
    ${label && html`<span class="command-label">${label}</span>`}
    <pre translate="no" data-testid=${testid} tabindex="0"><code>${text}</code></pre>
    <button type="button" class="copy" onclick=${copy} aria-label=${t("page.common.copy")} title=${t("page.common.copy")}><${Icon} name=${copied ? "ok" : "copy"} /></button>
    <span class="unseen" role="status">${copied ? t("page.common.copied") : ""}</span>
  </div>`;
}

/** Put a text on the clipboard, also where the page is not served over a secure address. */
export async function copyText(text) {
  if (navigator.clipboard && isSecureContext) return navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  return undefined;
}

// --- Jobs ----------------------------------------------------------------------------------------------------------

const stageKey = (stage) => `page.job.stage.${stage.replaceAll(" ", "_")}`;
/** A stage's name for people. */
export const stageText = (stage) => (hasText(stageKey(stage)) ? t(stageKey(stage)) : stage);
/** What kind of work a job is. */
export const jobTitle = (job) => (hasText(`page.job.kind.${job.kind}`) ? t(`page.job.kind.${job.kind}`) : job.kind);

const counted_ = (value, unit) => (unit === "bytes" ? formatBytes(value) : formatNumber(value));

/** How far a job is: bar, counts, speed, time left, and its log. */
export function Progress({ job, testid, log = true }) {
  useLang();
  if (!job) return null;
  const progress = job.progress;
  const share = progress?.total ? Math.min(1, progress.done / progress.total) : null;
  const running = !ended(job);
  const bar = useRef(null);
  useLayoutEffect(() => {
    bar.current?.style.setProperty("--share", share === null ? "0" : String(share));
  });
  const unit = progress && hasText(`page.job.unit.${progress.unit}`) ? t(`page.job.unit.${progress.unit}`) : (progress?.unit ?? "");
  const counts = progress && (progress.total ? `${counted_(progress.done, progress.unit)} / ${counted_(progress.total, progress.unit)}` : counted_(progress.done, progress.unit));
  const facts = progress && [
    progress.unit === "bytes" ? counts : `${counts} ${unit}`,
    progress.rate > 0 && (progress.unit === "bytes" ? `${formatBytes(progress.rate)}/s` : t("page.job.rate", { rate: figure(progress.rate), unit })),
    running && progress.eta_s != null && t("page.job.eta", { time: formatSeconds(progress.eta_s) }),
  ].filter(Boolean);
  return html`<div class="progress" data-testid=${testid}>
    <div class="progress-head">
      <span role="status">${job.state === "queued" ? t("page.job.queued") : progress ? stageText(progress.stage) : t("page.job.starting")}${job.cancelling && running ? ` · ${t("page.job.cancelling")}` : ""}</span>
      ${share !== null && html`<span class="progress-share">${Math.floor(100 * share)}%</span>`}
    </div>
    <div class=${`bar-track ${share === null && running ? "bar-waiting" : ""}`} role="progressbar" aria-label=${jobTitle(job)} aria-valuemin="0" aria-valuemax="100" aria-valuenow=${share === null ? undefined : Math.floor(100 * share)}><div class="bar-fill" ref=${bar}></div></div>
    ${facts && html`<p class="progress-facts">${facts.join(" · ")}${progress.detail && html` · <${Verbatim}>${progress.detail}<//>`}</p>`}
    ${log && job.log?.length > 0 && html`<${Log} lines=${job.log} open=${job.state === "failed"} />`}
  </div>`;
}

function Log({ lines, open }) {
  const end = useRef(null);
  useEffect(() => {
    const box = end.current;
    if (box) box.scrollTop = box.scrollHeight;
  }, [lines.length]);
  return html`<details class="log" open=${open}><summary>${t("page.job.log", { count: lines.length })}</summary><pre ref=${end} tabindex="0" translate="no">${lines.join("\n")}</pre></details>`;
}

/** A job with its state, progress, command and, while it goes on, a way to stop it. */
export function JobCard({ job, testid, cancelTestid, title }) {
  const [error, setError] = useState(null);
  useLang();
  if (!job) return null;
  if (job.lost) return html`<${Empty} title=${t("page.job.lost")} hint=${t("page.job.lost.hint")} />`;
  const stop = () => cancelJob(job.id).catch(setError);
  return html`<${Card} title=${title ?? jobTitle(job)} testid=${testid} actions=${!ended(job)
    ? html`<${Button} kind="danger" onclick=${stop} disabled=${job.cancelling} testid=${cancelTestid}>${t(job.stop_saves ? "page.job.stop_saves" : "page.job.cancel")}<//>`
    : html`<span class=${`job-state job-${job.state}`}><${Icon} name=${{ done: "ok", failed: "error", cancelled: "warning" }[job.state]} />${t(`page.job.state.${job.state}`)}</span>`}>
    ${(!ended(job) || job.progress || job.log?.length > 0) && html`<${Progress} job=${job} />`}
    <${ErrorBox} error=${error ?? job.error} />
    <${Command} text=${job.command} label=${t("page.common.command")} />
  <//>`;
}

/** A card of the job with this id, followed as it goes on. */
export const LiveJobCard = ({ id, ...rest }) => html`<${JobCard} job=${useJob(id)} ...${rest} />`;

// --- Charts --------------------------------------------------------------------------------------------------------

let vega = null;
const script = (name) =>
  new Promise((resolve, reject) => {
    const element = Object.assign(document.createElement("script"), { src: `/static/vendor/${name}.js`, onload: resolve, onerror: reject });
    document.head.append(element);
  });

// Charts are the heaviest part of the page, so they are fetched when the first one is drawn.
async function loadVega() {
  await script("vega");
  await Promise.all([script("vega-lite"), import("/static/vendor/vega-interpreter.js").then((module) => (vega.expr = module.expressionInterpreter))]);
  await script("vega-embed");
}
const vegaLoaded = () => {
  if (!vega) {
    vega = {};
    vega.loaded = loadVega();
  }
  return vega.loaded;
};

const INK = /#24292f/gi;
function themed(spec, width) {
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim() || "#24292f";
  const drawn = JSON.parse(JSON.stringify(spec).replace(INK, ink));
  delete drawn.$schema; // it names another release than the one that is drawn with
  const alone = !["vconcat", "hconcat", "concat", "facet"].some((kind) => kind in drawn);
  if (alone && drawn.width >= 600) {
    drawn.width = Math.max(260, width - 4);
    drawn.autosize = { type: "fit-x", contains: "padding" };
    if (width < 480) drawn.config = { ...drawn.config, legend: { ...drawn.config?.legend, columns: 2 } };
  }
  return drawn;
}

// What makes a chart another one: the theme, and the room it has.
function useLook(box) {
  const [look, setLook] = useState({ theme: "", width: 0 });
  useEffect(() => {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const update = () => setLook((before) => {
      const theme = `${document.documentElement.dataset.theme ?? ""}${dark.matches}`;
      const width = box.current?.clientWidth ?? 0;
      return before.theme === theme && Math.abs(before.width - width) < 4 ? before : { theme, width };
    });
    const room = new ResizeObserver(update);
    room.observe(box.current);
    const root = new MutationObserver(update);
    root.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    dark.addEventListener("change", update);
    update();
    return () => {
      room.disconnect();
      root.disconnect();
      dark.removeEventListener("change", update);
    };
  }, []);
  return look;
}

/** A Vega-Lite chart in the colours of the theme; `label` says what it shows, `onclick(datum)` hears of its marks. */
export function Chart({ spec, testid, label, onclick }) {
  const box = useRef(null);
  const outer = useRef(null);
  const look = useLook(outer);
  const [error, setError] = useState(null);
  const hear = useRef(onclick);
  hear.current = onclick;
  const written = useMemo(() => JSON.stringify(spec), [spec]);
  useEffect(() => {
    if (!spec || !look.width) return undefined;
    let gone = false, drawn = null;
    vegaLoaded()
      .then(() => (gone ? null : globalThis.vegaEmbed(box.current, themed(spec, look.width), {
        ast: true, expr: vega.expr, actions: false, renderer: "svg", defaultStyle: false,
        tooltip: { disableDefaultStyle: true, theme: "custom" },
      })))
      .then((result) => {
        drawn = result;
        if (gone) result?.finalize();
        else result?.view.addEventListener("click", (_, item) => item?.datum && hear.current?.(item.datum));
      })
      .catch((failure) => !gone && setError(failure));
    return () => {
      gone = true;
      drawn?.finalize();
    };
  }, [written, look]);
  return html`<div class="chart" ref=${outer} data-testid=${testid} role="img" aria-label=${label}>${error ? html`<${ErrorBox} error=${error} />` : html`<div class="chart-drawing scroll" ref=${box}></div>`}</div>`;
}

/** A button that downloads a file of the API. */
export function DownloadButton({ path, query, filename, children, testid }) {
  const [error, setError] = useState(null);
  const fetchIt = () => download(path, filename, query).then(() => setError(null), setError);
  return html`<${Button} onclick=${fetchIt} testid=${testid}>${children}<//><${ErrorBox} error=${error} />`;
}

export { currentLang, link };
