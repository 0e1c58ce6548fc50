// A training, from the recipe to the run: form and YAML beside each other, what it will be, its rows, and how it goes.
import {
  amend, api, ended, fill, formatBytes, formatNumber, formatSeconds, hasText, html, link, remembered, startJob, t, useEffect, useJob, useJobs, useLang,
  useLoad, useMemo, useReducer, useRef, useRun, useState,
} from "../core.js";
import {
  Button, Card, Chart, Empty, ErrorBox, Field, Findings, Icon, JobCard, Loading, NumberInput, PathInput, Select, Table, Tabs, TextInput, Toggle,
  Verbatim, confirmDialog, useKeys,
} from "../ui.js";

const GROUPS = [
  ["data", ["model_name_or_path", "dataset", "eval_dataset", "val_size", "template", "cutoff_len", "output_dir"]],
  ["adapter", ["lora_rank", "lora_alpha", "lora_target", "lora_dropout", "use_rslora", "use_dora"]],
  ["training", ["learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_ratio", "seed"]],
  ["saving", ["logging_steps", "save_steps", "eval_steps", "overwrite_output_dir"]],
];
const COMMON = GROUPS.flatMap(([, keys]) => keys);
const DRAFT = "recipe";
const START = `# The keys are LLaMA-Factory's.
model_name_or_path: demo
dataset: train.jsonl
val_size: 0.1
output_dir: out/my-run

lora_rank: 8
lora_target: all

learning_rate: 1.0e-4
num_train_epochs: 3
per_device_train_batch_size: 4
lr_scheduler_type: cosine
warmup_ratio: 0.1
logging_steps: 5
save_steps: 50
seed: 42
`;

// --- The recipe: one text, two ways to edit it ---------------------------------------------------------------------

function reduce(state, change) {
  return { ...state, ...change };
}

// The text is what counts; the form is read from it and written into it, each after a pause in typing.
function useRecipe() {
  const [state, set] = useReducer(reduce, { text: remembered(DRAFT) ?? START, values: null, keys: [], problems: [], error: null, busy: false });
  const turn = useRef(0);
  const timer = useRef(null);
  const newest = useRef(state);
  newest.current = state;
  const later = (wait, act) => {
    const mine = ++turn.current;
    clearTimeout(timer.current);
    set({ busy: true });
    timer.current = setTimeout(async () => {
      try {
        await act(() => mine === turn.current);
      } catch (error) {
        if (mine === turn.current) set({ error, busy: false });
      }
    }, wait);
  };
  const read = async (text, current) => {
    const { values, keys, problems } = await api.post("recipe/read", { text });
    if (current()) set({ values, keys, problems: problems ?? [], error: null, busy: false });
  };
  const setText = (text) => {
    set({ text });
    remembered(DRAFT, text);
    later(350, (current) => read(text, current));
  };
  const setValue = (key, value) => {
    const values = { ...(newest.current.values ?? {}) };
    if (value === null || value === "" || value === undefined) delete values[key];
    else values[key] = value;
    newest.current = { ...newest.current, values };
    set({ values });
    later(250, async (current) => {
      const { text } = await api.post("recipe/write", { values });
      if (!current()) return;
      set({ text });
      remembered(DRAFT, text);
      await read(text, current);
    });
  };
  const setValues = async (values) => {
    const { text } = await api.post("recipe/write", { values });
    setText(text);
  };
  useEffect(() => {
    later(0, (current) => read(state.text, current));
    return () => clearTimeout(timer.current);
  }, []);
  return { ...state, setText, setValue, setValues };
}

const asLine = (value) => (Array.isArray(value) ? value.join(", ") : value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));
const labelOf = (key) => (hasText(`page.train.key.${key}`) ? t(`page.train.key.${key}`) : hasText(`param.${key}`) ? t(`param.${key}`) : key);
const hintOf = (key) => (hasText(`page.train.about.${key}`) ? t(`page.train.about.${key}`) : hasText(`page.overview.about.${key}`) ? t(`page.overview.about.${key}`) : null);

function KeyInput({ name, about, value, onchange }) {
  const placeholder = about?.default === null || about?.default === undefined ? "" : asLine(about.default);
  const common = { value, onchange, testid: `recipe-${name}` };
  if (name === "output_dir") return html`<${PathInput} ...${common} value=${asLine(value)} pick="folder" />`;
  if (about?.type === "bool") return html`<${Toggle} ...${common} value=${value ?? about.default ?? false} onchange=${(on) => onchange(on === (about.default ?? false) ? null : on)} />`;
  if (about?.choices?.length > 1 && about.choices.length <= 24) {
    const options = [[null, placeholder ? t("page.train.default", { value: placeholder }) : "–"], ...about.choices.map((choice) => [choice, asLine(choice)])];
    return html`<${Select} ...${common} value=${value ?? null} options=${options} />`;
  }
  if (about?.type === "int" || about?.type === "float") {
    const fits = value === undefined || value === null || typeof value === "number";
    if (fits) return html`<${NumberInput} ...${common} placeholder=${placeholder} integer=${about.type === "int"} min=${about.minimum ?? undefined} max=${about.maximum ?? undefined} />`;
  }
  return html`<${TextInput} ...${common} mono value=${asLine(value)} placeholder=${placeholder} />`;
}

function Form({ recipe, about }) {
  const values = recipe.values ?? {};
  const problemOf = (key) => recipe.problems.filter((problem) => problem.startsWith(`${key}:`)).map((problem) => problem.slice(key.length + 2))[0];
  return html`<div data-testid="recipe-form">${GROUPS.map(([group, keys]) => html`<section class="recipe-group" key=${group}><h3>${t(`page.train.group.${group}`)}</h3><div class="fields">
    ${keys.map((key) => html`<${Field} key=${key} label=${html`${labelOf(key)} <code class="key-name" translate="no">${key}</code>`} hint=${hintOf(key)} error=${problemOf(key)}><${KeyInput} name=${key} about=${about.get(key)} value=${values[key]} onchange=${(value) => recipe.setValue(key, value)} /><//>`)}
  </div></section>`)}</div>`;
}

function KeyUses({ keys }) {
  const told = keys.filter((key) => key.use !== "used" || key.note);
  if (!told.length) return null;
  const columns = [
    { key: "key", title: t("page.train.column.key"), render: (key) => html`<code>${key.key}: ${key.value}</code>` },
    { key: "use", title: t("page.train.column.use"), kind: "nowrap", render: (key) => html`<span class=${`use-${key.use}`}>${t(`page.train.use.${key.use}`)}</span>` },
    { key: "note", title: t("page.train.column.why"), kind: "what" },
  ];
  return html`<details open=${told.some((key) => key.use === "refused")}><summary>${t("page.train.keys", { count: told.length })}</summary><${Table} columns=${columns} rows=${told} label=${t("page.train.keys", { count: told.length })} /></details>`;
}

function Yaml({ recipe }) {
  return html`<div class="yaml">
    <${Field} label="YAML" hint=${t("page.train.yaml.hint")}><${TextInput} mono rows=${26} value=${recipe.text} onchange=${recipe.setText} testid="recipe-yaml" /><//>
    <${ErrorBox} error=${recipe.error} />
    ${!recipe.error && recipe.problems.length > 0 && html`<div class="problems" role="status" data-testid="recipe-problems"><p><${Icon} name="warning" />${t("page.train.problems", { count: recipe.problems.length })}</p><ul class="error-details">${recipe.problems.map((problem) => html`<li key=${problem}>${problem}</li>`)}</ul></div>`}
    <${KeyUses} keys=${recipe.keys} />
  </div>`;
}

// A run names its places from where it lies; a recipe of the page's, from the root.
function placed(value, home) {
  const one = (name) => (/^\.{1,2}\//.test(name) ? new URL(name.split("/").map(encodeURIComponent).join("/"), `file://${home.split("/").map(encodeURIComponent).join("/")}/`).pathname.split("/").map(decodeURIComponent).join("/") : name);
  return typeof value === "string" ? value.split(",").map((name) => one(name.trim())).join(",") : Array.isArray(value) ? value.map((name) => placed(name, home)) : value;
}

// Start from something that is there: the open run's own settings, or the demo's.
function Beginnings({ recipe, query, session }) {
  const { data } = useRun({ run: query.run, base: query.base });
  const fromRun = () => {
    const { run, adapter } = data.inspection;
    const known = new Map([
      ["model_name_or_path", run.base_model], ["lora_rank", adapter?.r], ["lora_alpha", adapter?.lora_alpha],
      ...run.settings.map((setting) => [setting.name, setting.value]),
    ]);
    const values = {};
    for (const key of COMMON) if (known.get(key) != null) values[key] = known.get(key);
    for (const key of ["model_name_or_path", "dataset", "eval_dataset"]) if (values[key] !== undefined) values[key] = placed(values[key], run.path);
    values.output_dir = `${run.path.replace(/\/+$/, "")}-2`;
    delete values.overwrite_output_dir;
    recipe.setValues(values);
  };
  const fromDemo = () => {
    const home = session.demo.run.replace(/\/[^/]*$/, "");
    recipe.setValues({
      model_name_or_path: "demo", dataset: `${home}/workshop_train.jsonl`, eval_dataset: `${home}/workshop_held_out.jsonl`, output_dir: "out/workshop", lora_rank: 8, lora_target: "all",
      per_device_train_batch_size: 4, learning_rate: 0.001, lr_scheduler_type: "cosine", warmup_ratio: 0.1, max_steps: 48, logging_steps: 4, save_steps: 16, seed: 42,
    });
  };
  return html`${data?.inspection.run.settings.length > 0 && html`<${Button} onclick=${fromRun} testid="recipe-from-run">${t("page.train.from_run")}<//>`}
    ${session?.demo?.run && html`<${Button} onclick=${fromDemo} testid="recipe-from-demo">${t("page.train.from_demo")}<//>`}`;
}

function RecipeCard({ recipe, query, session }) {
  const { data } = useLoad("keys", () => api.get("recipe/keys"));
  const about = useMemo(() => new Map((data?.keys ?? []).map((key) => [key.key, key])), [data]);
  const [view, setView] = useState("both");
  const tabs = [["both", "page.train.view.both"], ["form", "page.train.view.form"], ["yaml", "YAML"]].map(([key, title]) => ({ key, title: hasText(title) ? t(title) : title }));
  return html`<${Card} title=${t("page.train.recipe")} actions=${html`<${Beginnings} recipe=${recipe} query=${query} session=${session} />`}>
    <${Tabs} tabs=${tabs} value=${view} onchange=${setView} label=${t("page.train.recipe")}>
      <div class=${view === "both" ? "train-grid" : ""}>
        ${view !== "yaml" && html`<${Form} recipe=${recipe} about=${about} />`}
        ${view !== "form" && html`<${Yaml} recipe=${recipe} />`}
      </div>
    <//>
    ${view === "form" && html`<${ErrorBox} error=${recipe.error} />`}
  <//>`;
}

// --- What it will be -----------------------------------------------------------------------------------------------

const Pieces = ({ pieces, testid }) =>
  html`<p class="legend"><mark>${t("page.train.supervised")}</mark><span>${t("page.train.unsupervised")}</span></p>
    <div class="example" tabindex="0" role="region" aria-label=${t("page.train.example")} dir="auto" translate="no" data-testid=${testid}>${pieces.map((piece) => (piece.supervised ? html`<mark>${piece.text}</mark>` : html`<span>${piece.text}</span>`))}</div>`;

function Tile({ name, value, about, tone }) {
  return html`<div class=${`tile ${tone ? `tone-${tone}` : ""}`}><dt>${name}</dt><dd>${value}${about && html`<span class="about">${about}</span>`}</dd></div>`;
}

function Tiles({ plan }) {
  const share = plan.train_rows ? plan.cut_rows / plan.train_rows : 0;
  const memory = plan.memory;
  const tight = memory?.free_bytes != null && memory.total_bytes > memory.free_bytes;
  return html`<dl class="tiles" data-testid="plan-tiles">
    <${Tile} name=${t("page.train.plan.rows")} value=${formatNumber(plan.train_rows)} about=${t("page.train.plan.held_out", { rows: plan.held_out_rows })} />
    <${Tile} name=${t("page.train.plan.steps")} value=${formatNumber(plan.steps)} about=${t("page.train.plan.steps.about", { epochs: plan.epochs, rows: plan.rows_a_step })} />
    <${Tile} name=${t("page.train.plan.tokens")} value=${formatNumber(plan.supervised_tokens)} about=${t("page.train.plan.tokens.about", { tokens: plan.tokens })} />
    <${Tile} name=${t("page.train.plan.cut")} value=${fill("{v:.1%}", { v: share })} tone=${share > 0.05 ? "warn" : ""} about=${t("page.train.plan.cut.about", { rows: plan.cut_rows, limit: plan.cutoff_len })} />
    <${Tile} name=${t("page.train.plan.memory")} value=${memory ? formatBytes(memory.total_bytes) : "–"} tone=${tight ? "fail" : ""} about=${memory?.free_bytes == null ? null : t(tight ? "page.train.plan.memory.tight" : "page.train.plan.memory.free", { free: memory.free_bytes })} />
    <${Tile} name=${t("page.train.plan.time")} value=${plan.seconds == null ? "–" : formatSeconds(plan.seconds)} about=${`${plan.dtype} · ${plan.device}`} />
    <${Tile} name=${t("page.train.plan.parameters")} value=${plan.trained_parameters == null ? "–" : formatNumber(plan.trained_parameters)} about=${plan.gradient_checkpointing ? t("page.train.plan.checkpointing") : null} />
  </dl>`;
}

function lengthsSpec({ lengths, cutoff_len: limit }) {
  const values = lengths.counts.map((rows, place) => ({ from: lengths.edges[place], to: lengths.edges[place + 1], rows }));
  const ink = "#24292f";
  const words = { labelColor: ink, titleColor: ink, titleFontWeight: "normal", labelOpacity: 0.75, titleOpacity: 0.75, domainOpacity: 0.3, domainColor: ink, tickOpacity: 0.3, tickColor: ink, gridColor: ink, gridOpacity: 0.1 };
  const layer = [{
    data: { values }, mark: { type: "rect", color: "#4c7fd9", stroke: null },
    encoding: {
      x: { field: "from", type: "quantitative", scale: { zero: false, nice: false }, title: t("page.train.plan.length"), axis: { grid: false, tickCount: 8 } }, x2: { field: "to" },
      y: { field: "rows", type: "quantitative", title: t("page.train.plan.rows"), axis: { tickCount: 4 } }, y2: { datum: 0 },
      tooltip: [{ field: "from", title: "≥" }, { field: "to", title: "<" }, { field: "rows", title: t("page.train.plan.rows") }],
    },
  }];
  if (limit < lengths.edges.at(-1)) layer.push({ data: { values: [{ limit }] }, mark: { type: "rule", strokeDash: [4, 4], color: "#d0812c", strokeWidth: 2 }, encoding: { x: { field: "limit", type: "quantitative" } } });
  return { $schema: "https://vega.github.io/schema/vega-lite/v5.json", background: null, padding: 2, width: 800, height: 150, layer, config: { view: { stroke: null }, axis: words } };
}

function Plan({ plan }) {
  const lang = useLang();
  const spec = useMemo(() => lengthsSpec(plan), [plan, lang]);
  const { shortest, median, p95, longest } = plan.lengths;
  return html`<${Tiles} plan=${plan} />
    ${plan.dtype_note && html`<p class="note">${plan.dtype_note}</p>`}
    ${plan.findings.length > 0 && html`<${Findings} findings=${plan.findings} />`}
    <h3>${t("page.train.plan.lengths")}</h3>
    <${Chart} spec=${spec} testid="length-chart" label=${t("page.train.plan.lengths")} />
    <p class="note">${t("page.train.plan.lengths.about", { shortest, median, p95, longest, limit: plan.cutoff_len })}</p>
    <h3>${t("page.train.example")}</h3>
    <${Pieces} pieces=${plan.example} testid="plan-example" />`;
}

function PlanCard({ recipe, query }) {
  const [error, setError] = useState(null);
  const job = useJob(query.plan ?? null);
  const start = () =>
    startJob("plan_training", { recipe_text: recipe.text }).then((started) => {
      setError(null);
      amend({ plan: started.id });
    }, setError);
  useKeys({ run: start });
  const stale = job?.state === "done" && job.params?.recipe_text !== recipe.text;
  return html`<${Card} title=${t("page.train.plan")} actions=${html`<${Button} onclick=${start} disabled=${(job && !ended(job)) || recipe.problems.length > 0} testid="plan-start" title="Ctrl/⌘ + Enter">${t(job?.state === "done" ? "page.train.plan.again" : "page.train.plan.start")}<//>`}>
    ${!job && html`<p class="quiet">${t("page.train.plan.hint")}</p>`}
    <${ErrorBox} error=${error} />
    ${job && job.state !== "done" && html`<${JobCard} job=${job} />`}
    ${stale && html`<p class="field-error">${t("page.train.plan.stale")}</p>`}
    ${job?.state === "done" && job.result && html`<${Plan} plan=${job.result} />`}
  <//>`;
}

// --- The rows ------------------------------------------------------------------------------------------------------

function Preview({ recipe }) {
  const [row, setRow] = useState(null);
  const [state, setState] = useState({ data: null, error: null, busy: false });
  const show = async (wanted) => {
    const at = Math.max(0, wanted);
    setRow(at);
    setState((before) => ({ ...before, busy: true }));
    try {
      const data = await api.post("data/preview", { recipe_text: recipe.text, row: at });
      setState({ data, error: null, busy: false });
    } catch (error) {
      setState({ data: null, error, busy: false });
    }
  };
  const shown = state.data?.row;
  const facts = shown && typeof shown === "object" ? shown : state.data;
  const rows = state.data?.rows;
  const picker = row === null
    ? html`<${Button} onclick=${() => show(0)} testid="preview-start" disabled=${recipe.problems.length > 0}>${t("page.train.preview.start")}<//>`
    : html`<div class="row-picker">
        <${Button} onclick=${() => show(row - 1)} disabled=${row <= 0 || state.busy} testid="preview-previous">${t("page.train.preview.previous")}<//>
        <span>${t("page.train.preview.row")}</span><${NumberInput} value=${row + 1} integer min=${1} max=${rows ?? undefined} onchange=${(number) => number && show(number - 1)} label=${t("page.train.preview.row")} testid="preview-row" /><span>/ ${formatNumber(rows)}</span>
        <${Button} onclick=${() => show(row + 1)} disabled=${(rows != null && row >= rows - 1) || state.busy} testid="preview-next">${t("page.train.preview.next")}<//>
      </div>`;
  return html`<${Card} title=${t("page.train.preview")} actions=${picker}>
    ${row === null && html`<p class="quiet">${t("page.train.preview.hint")}</p>`}
    ${state.busy && !state.data && html`<${Loading} />`}
    <${ErrorBox} error=${state.error} retry=${() => show(row)} />
    ${facts?.pieces && html`
      ${facts.tokens != null && html`<p class="quiet">${t("page.train.preview.tokens", { tokens: facts.tokens })}${facts.cut ? ` · ${t("page.train.preview.is_cut")}` : ""}</p>`}
      ${facts.pieces.length ? html`<${Pieces} pieces=${facts.pieces} testid="preview-text" />` : html`<${Empty} title=${t("page.train.preview.left_out")} />`}
      ${facts.findings?.length > 0 && html`<${Findings} findings=${facts.findings} />`}`}
  <//>`;
}

// --- The training --------------------------------------------------------------------------------------------------

const outputOf = (text) => /^output_dir:[ \t]*(?:"([^"\n]*)"|'([^'\n]*)'|([^#\n]*?))[ \t]*(?:#.*)?$/m.exec(text ?? "")?.slice(1).find((part) => part !== undefined) ?? null;

function lossSpec(log) {
  const points = (key) => log.filter((row) => Number.isFinite(row[key])).map((row) => ({ step: row.step, loss: row[key] }));
  const ink = "#24292f";
  const words = { labelColor: ink, titleColor: ink, titleFontWeight: "normal", labelOpacity: 0.75, titleOpacity: 0.75, domainOpacity: 0.3, domainColor: ink, tickOpacity: 0.3, tickColor: ink, gridColor: ink, gridOpacity: 0.1 };
  const scale = { domain: [t("chart.loss.title"), t("chart.eval_loss.title")], range: ["#4c7fd9", "#d0812c"] };
  const curve = (values, name) => ({
    data: { values }, mark: { type: "line", strokeWidth: 2.25, point: { size: 34, filled: true } },
    encoding: {
      x: { field: "step", type: "quantitative", title: t("chart.step"), axis: { tickMinStep: 1, grid: false } }, y: { field: "loss", type: "quantitative", title: t("chart.loss.y"), scale: { zero: false } },
      color: { datum: name, type: "nominal", scale, title: null }, tooltip: [{ field: "step", title: t("chart.step") }, { field: "loss", title: t("page.overview.loss"), format: ".4f" }],
    },
  });
  const layer = [[points("loss"), scale.domain[0]], [points("eval_loss"), scale.domain[1]]].filter(([values]) => values.length).map((each) => curve(...each));
  if (!layer.length) return null;
  return { $schema: "https://vega.github.io/schema/vega-lite/v5.json", background: null, padding: 2, width: 800, height: 220, layer, config: { view: { stroke: null }, axis: words, legend: { ...words, orient: "top", symbolType: "stroke" } } };
}

// What trainer_log.jsonl says so far, asked for again while the training goes on.
function useTrainingLog(job) {
  const out = job ? (job.params?.run ?? outputOf(job.params?.recipe_text)) : null;
  const [log, setLog] = useState([]);
  const running = job && !ended(job);
  // Before its steps there may be no directory to ask about.
  const begun = job?.progress?.stage === "train";
  useEffect(() => setLog([]), [job?.id]);
  useEffect(() => {
    if (!out || !begun) return undefined;
    let gone = false;
    const ask = async () => {
      const found = await api.get("run/log", { path: out }).catch(() => null);
      if (!gone && found?.log) setLog(found.log);
    };
    ask();
    const timer = running ? setInterval(() => !document.hidden && ask(), 2000) : null;
    return () => {
      gone = true;
      clearInterval(timer);
    };
  }, [out, job?.id, job?.state, begun]);
  return log;
}

function Training({ job }) {
  const lang = useLang();
  const log = useTrainingLog(job);
  const spec = useMemo(() => lossSpec(log), [log, lang]);
  const [error, setError] = useState(null);
  const run = job.result?.path ?? job.result?.run ?? outputOf(job.params?.recipe_text) ?? job.params?.run;
  // Before its first step there is nothing to go on from, unless it went on itself.
  const begun = job.params?.resume || (job.progress?.stage === "train" && job.progress.done > 0);
  const goOn = () => {
    const { recipe_text, run: from, overrides } = job.params;
    startJob("train", from ? { run: from, overrides, resume: true } : { recipe_text, overrides, resume: true }).then((started) => {
      setError(null);
      amend({ job: started.id });
    }, setError);
  };
  return html`<${JobCard} job=${job} testid="train-job" cancelTestid="train-stop" />
    ${job.state === "cancelled" && !begun && html`<${Card} title=${t("page.train.stopped.early")} testid="train-stopped-early"><p>${t("page.train.stopped.early.hint")}</p><//>`}
    ${job.state === "cancelled" && begun && html`<${Card} title=${t("page.train.stopped")}><p>${t("page.train.stopped.hint")}</p><div class="actions"><${Button} kind="primary" onclick=${goOn} testid="train-resume">${t("page.train.resume")}<//><${Button} href=${link("overview", { run })}>${t("page.train.look")}<//></div><${ErrorBox} error=${error} /><//>`}
    ${job.state === "failed" && begun && html`<div class="actions"><${Button} onclick=${goOn}>${t("page.train.resume")}<//></div><${ErrorBox} error=${error} />`}
    ${job.state === "done" && html`<section class="callout tone-ok" data-testid="train-done"><h2><${Icon} name="ok" />${t("page.train.done")}</h2><p><${Verbatim}>${run}<//></p><div class="actions"><${Button} kind="primary" href=${link("overview", { run, base: null })}>${t("page.train.look")}<//><${Button} href=${link("compare", { run, base: null })}>${t("page.overview.next.compare")}<//></div></section>`}
    ${spec ? html`<${Card} title=${t("section.loss")}><${Chart} spec=${spec} testid="loss-chart" label=${t("section.loss")} /><//>` : !ended(job) && html`<p class="quiet">${t("page.train.no_loss_yet")}</p>`}`;
}

function Start({ recipe, job }) {
  const [error, setError] = useState(null);
  const [path, setPath] = useState("");
  const start = async () => {
    const out = outputOf(recipe.text);
    const sure = recipe.values?.overwrite_output_dir !== true || (await confirmDialog({ title: t("page.train.overwrite"), text: t("page.train.overwrite.text", { out }), danger: true, confirm: t("page.train.start") }));
    if (!sure) return;
    startJob("train", { recipe_text: recipe.text, ...(path.trim() ? { recipe_path: path.trim() } : {}) }).then((started) => {
      setError(null);
      amend({ job: started.id });
      scrollTo(0, 0); // where it is shown
    }, setError);
  };
  const busy = job && !ended(job);
  return html`<${Card} title=${t("page.train.start_title")} testid="train-card">
    <div class="fields"><${Field} label=${t("page.train.keep")} hint=${t("page.train.keep.hint")}><${TextInput} mono value=${path} onchange=${setPath} placeholder="recipe.yaml" testid="recipe-path" /><//></div>
    <div class="actions"><${Button} kind="primary" onclick=${start} disabled=${busy || recipe.problems.length > 0 || Boolean(recipe.error)} testid="train-start">${t("page.train.start")}<//>
      ${recipe.problems.length > 0 && html`<span class="quiet">${t("page.train.mend_first")}</span>`}</div>
    <${ErrorBox} error=${error} />
  <//>`;
}

export default function Page({ query, session }) {
  const recipe = useRecipe();
  const jobs = useJobs();
  // A training that goes on is shown, whoever started it; else the one the address names.
  const running = jobs.find((one) => one.kind === "train" && !ended(one));
  const named = jobs.find((one) => one.id === query.job && one.kind === "train");
  const job = useJob(running?.id ?? named?.id ?? query.job ?? null);
  const shown = job?.kind === "train" && !job.lost ? job : null;
  return html`
    <h1>${t("page.train.title")}</h1>
    <p class="intro">${t("page.train.intro")}</p>
    ${shown && html`<${Training} job=${shown} />`}
    ${job?.lost && html`<${JobCard} job=${job} />`}
    <${RecipeCard} recipe=${recipe} query=${query} session=${session} />
    <${PlanCard} recipe=${recipe} query=${query} />
    <${Preview} recipe=${recipe} />
    <${Start} recipe=${recipe} job=${shown} />`;
}
