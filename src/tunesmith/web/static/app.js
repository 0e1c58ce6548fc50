// The frame around every page: navigation, run card, top bar; it loads the page that the address names.
import {
  begin, html, kept, link, remembered, render, sentence, setLang, setToken, t, useEffect, useJobs, useLang, useLost, useRef, useRoute,
  useRun, useSession, useState, visible,
} from "./core.js";
import { Button, Empty, ErrorBox, Guard, Icon, Loading, Rich, Verbatim, jobTitle } from "./ui.js";

const PAGES = ["open", "overview", "train", "chat", "compare", "merge", "verify", "report"];
const modules = Object.fromEntries(PAGES.map((name) => [name, () => import(`./pages/${name}.js`)]));
// A job belongs to the page that can show it.
const JOB_PAGES = {
  demo: "open", plan_training: "train", train: "train", checkpoints: "overview", cleanup: "overview", compare: "compare", evaluate: "compare",
  merge: "merge", quantize: "merge", drift: "merge", gguf: "merge", push: "merge", verify: "verify", verify_gguf: "verify", report: "report",
};

const THEMES = ["auto", "light", "dark"];
const applyTheme = (theme) => {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
};

function ThemeSwitch() {
  const [theme, setTheme] = useState(THEMES.includes(remembered("theme")) ? remembered("theme") : "auto");
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  const turn = () => {
    applyTheme(next);
    remembered("theme", next);
    setTheme(next);
  };
  const said = `${t("switch.theme")}: ${t(`theme.${theme}`)}`;
  return html`<button type="button" class="switch" data-testid="theme" data-value=${theme} onclick=${turn} title=${said} aria-label=${said}><${Icon} name=${{ auto: "auto", light: "sun", dark: "moon" }[theme]} /></button>`;
}

function LanguageSwitch() {
  const lang = useLang();
  const other = lang === "zh" ? "en" : "zh";
  return html`<button type="button" class="switch" data-testid="lang" data-value=${lang} onclick=${() => setLang(other)} lang=${other === "zh" ? "zh-CN" : "en"} aria-label=${other === "zh" ? "切换到中文" : "Switch to English"}>
    <span aria-hidden="true" class=${lang === "zh" ? "chosen" : ""}>中</span><span aria-hidden="true" class=${lang === "en" ? "chosen" : ""}>EN</span>
  </button>`;
}

function JobChip() {
  const jobs = useJobs();
  const running = jobs.find((job) => job.state === "running") ?? jobs.find((job) => job.state === "queued");
  const waiting = jobs.filter((job) => job.state === "queued" && job !== running).length;
  const ring = useRef(null);
  const progress = running?.progress;
  const share = progress?.total ? Math.min(1, progress.done / progress.total) : null;
  useEffect(() => {
    ring.current?.style.setProperty("--share", String(share ?? 0));
  });
  if (!running) return null;
  const params = running.params ?? {};
  const address = link(JOB_PAGES[running.kind] ?? "open", { ...(running.kind === "evaluate" ? { tab: "effect", evaluation: running.id } : { job: running.id }), ...(params.run ? { run: params.run } : {}) });
  return html`<a class="job-chip" data-testid="job" data-kind=${running.kind} data-state=${running.state} href=${address} aria-label=${`${jobTitle(running)}${share === null ? "" : ` ${Math.floor(100 * share)}%`}`}>
    <span class=${`ring ${share === null ? "ring-waiting" : ""}`} ref=${ring} aria-hidden="true"></span>
    <span class="job-name">${jobTitle(running)}</span>${share !== null && html`<span>${Math.floor(100 * share)}%</span>`}${waiting > 0 && html`<span class="quiet">+${waiting}</span>`}
  </a>`;
}

const named = (path) => path.replace(/\/+$/, "").split("/").pop() || path;

function RunCard({ query, session }) {
  const { data, loading } = useRun({ run: query.run, base: query.base });
  if (!query.run) {
    return html`<a class="run-card" href=${link("open")}><span class="run-name">${t("page.nav.no_run")}</span><span class="quiet">${t("page.nav.open_one")}</span></a>`;
  }
  const loaded = session?.loaded && (session.loaded.run === data?.inspection.run.path || session.loaded.run === query.run);
  const adapter = data?.inspection.adapter;
  const device = session?.loaded ?? session?.device;
  const lines = [
    data?.inspection.run.base_model && html`<${Verbatim} title=${data.inspection.run.base_model}>${named(data.inspection.run.base_model)}<//>`,
    adapter && `${adapter.r == null ? adapter.peft_type : `r ${adapter.r}`}${adapter.lora_alpha == null ? "" : ` · α ${adapter.lora_alpha}`} · ${query.variant ?? data.inspection.checkpoint}`,
    device && `${device.dtype ?? ""} · ${device.device ?? ""}`,
  ].filter(Boolean);
  return html`<a class="run-card" href=${link("overview")}>
    <span class="run-name"><span class=${`dot ${loaded ? "dot-on" : ""}`} role="img" aria-label=${t(loaded ? "page.nav.loaded" : "page.nav.unloaded")} title=${t(loaded ? "page.nav.loaded" : "page.nav.unloaded")}></span><${Verbatim} title=${query.run}>${named(data?.inspection.run.path ?? query.run)}<//></span>
    ${loading && !data ? html`<span class="quiet">…</span>` : lines.map((line) => html`<span class="run-fact">${line}</span>`)}
  </a>`;
}

function Navigation({ page, query, session }) {
  return html`<aside class="side">
    <a class="brand" href=${link("open")}><${Icon} name="fork" />${t("app.name")}</a>
    <${RunCard} query=${query} session=${session} />
    <nav aria-label=${t("page.nav.label")}>${PAGES.map((name) => html`<a href=${link(name)} data-testid=${`nav-${name}`} aria-current=${name === page ? "page" : undefined}><${Icon} name=${name} /><span>${t(`page.nav.${name}`)}</span></a>`)}</nav>
    <p class="version">${session?.version ? `Tunesmith ${session.version}` : ""}</p>
  </aside>`;
}

function TopBar({ query }) {
  return html`<header class="top">
    <a class="brand narrow-only" href=${link("open")} aria-label=${t("app.name")}><${Icon} name="fork" /></a>
    <span class="narrow-only top-run">${query.run ? html`<${Verbatim}>${named(query.run)}<//>` : t("app.name")}</span>
    <span class="grow"></span>
    <${JobChip} />
    <${LanguageSwitch} />
    <${ThemeSwitch} />
  </header>`;
}

function TokenPrompt({ error, retry }) {
  const [value, setValue] = useState("");
  const send = (event) => {
    event.preventDefault();
    setToken(value.trim());
    retry();
  };
  // No text can be fetched without the token, so this one place says its words in both languages itself.
  return html`<main class="token"><form class="card" onsubmit=${send}>
    <h1>Tunesmith</h1>
    <p>This server asks for the token that it printed with its address.</p>
    <p lang="zh-CN">服务器需要令牌，它和网址一起显示在启动服务的终端里。</p>
    <label for="token">Token · 令牌</label>
    <input id="token" type="password" autocomplete="off" value=${value} oninput=${(event) => setValue(event.target.value)} />
    ${kept("token") && html`<p class="field-error" role="alert">${sentence(error.error?.what)}</p>`}
    <${Button} kind="primary" type="submit">OK<//>
  </form></main>`;
}

function usePage(name) {
  const [state, setState] = useState({ name: null, Page: null, error: null });
  useEffect(() => {
    let gone = false;
    modules[name]().then(
      (module) => gone || setState({ name, Page: module.default, error: null }),
      (error) => gone || setState({ name, Page: null, error }),
    );
    return () => {
      gone = true;
    };
  }, [name]);
  return state.name === name ? state : { Page: null, error: null };
}

function App() {
  const lang = useLang();
  const route = useRoute();
  const session = useSession();
  const lost = useLost();
  const main = useRef(null);
  const page = PAGES.includes(route.page) ? route.page : null;
  const { Page, error } = usePage(page ?? "open");
  const first = useRef(true);
  useEffect(() => {
    document.title = visible(`${page ? `${t(`page.nav.${page}`)} · ` : ""}${route.query.run ? `${named(route.query.run)} · ` : ""}Tunesmith`);
  }, [page, route.query.run, lang]);
  useEffect(() => {
    // At a change of pages the focus goes where the new one begins, but not when the page is first opened.
    if (!first.current) {
      scrollTo(0, 0);
      main.current?.focus({ preventScroll: true });
    }
    first.current = false;
  }, [page]);
  if (lost?.status === 401) return html`<${TokenPrompt} error=${lost} retry=${() => location.reload()} />`;
  return html`
    <a class="skip" href="#main" onclick=${(event) => (event.preventDefault(), main.current?.focus())}>${t("page.nav.skip")}</a>
    <div class="frame">
      <${Navigation} page=${page} query=${route.query} session=${session} />
      <div class="body">
        <${TopBar} query=${route.query} />
        ${lost && html`<div class="lost" role="alert"><${Icon} name="warning" /><span>${sentence(lost.error?.what) ?? t("page.error.unreachable")} ${lost.error?.next && html`<${Rich} text=${lost.error.next} />`}</span></div>`}
        <main id="main" ref=${main} tabindex="-1" class=${`page-${page ?? "none"}`}>
          ${route.page && !page
            ? html`<h1>${t("page.nav.unknown")}</h1><${Empty} title=${t("page.nav.unknown.hint")} action=${html`<${Button} href=${link("open")}>${t("page.nav.open")}<//>`} />`
            : html`<${Guard} key=${page}>${error ? html`<${ErrorBox} error=${error} />` : Page ? html`<${Page} query=${route.query} session=${session} />` : html`<${Loading} />`}<//>`}
        </main>
      </div>
    </div>`;
}

async function start() {
  const root = document.getElementById("app");
  applyTheme(remembered("theme") ?? "auto");
  try {
    await begin();
  } catch (error) {
    if (error.status === 401) return render(html`<${TokenPrompt} error=${error} retry=${() => location.reload()} />`, root);
    return render(html`<main class="token"><${ErrorBox} error=${{ what: `${error.message}`, error: "InternalError" }} retry=${() => location.reload()} /></main>`, root);
  }
  render(html`<${First} />`, root);
  return undefined;
}

// The bare address leads to the run that the server was started with, or to where one is opened.
function First() {
  const { page, query } = useRoute();
  const session = useSession();
  useEffect(() => {
    if (page || !session) return;
    const run = query.run ?? session.run;
    const address = link(run ? "overview" : "open", { run, base: query.base ?? session.base });
    history.replaceState(null, "", address);
    dispatchEvent(new HashChangeEvent("hashchange"));
  }, [page, session]);
  return html`<${App} />`;
}

start();
