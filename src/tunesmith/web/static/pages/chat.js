// Chat: one variant answers, a word at a time.
import { amend, api, go, html, refreshSession, stream, t, useEffect, useRef, useRun, useState } from "../core.js";
import { Button, Command, Empty, ErrorBox, Loading, confirmDialog, useKeys } from "../ui.js";
import {
  LoadingLine, Refusal, ReplyFoot, SettingsForm, VariantSelect, Writing, generationOf, outside, recall, remember, useRunOf, streamed, useSettings, variantsOf,
} from "./variants.js";

const KEPT = "chats";
const SAVE_EVERY_MS = 500;

const chats = outside(recall(KEPT, {}));
let active = null;
let saved = 0;

// What was being written when the page was reloaded is cut there.
for (const turn of Object.values(chats.value).flat()) {
  if (turn.busy) Object.assign(turn, { busy: false, phase: null, turn: { stop_reason: "cancelled" } });
}

const tell = (now = true) => {
  if (now || Date.now() - saved > SAVE_EVERY_MS) {
    saved = Date.now();
    remember(KEPT, chats.value);
  }
  chats.changed();
};

const stop = () => active?.controller.abort();

function received(reply, event, data) {
  if (event === "loading") reply.phase = { loading: data.progress };
  else if (event === "prompt") Object.assign(reply, { prompt: data.text, token_ids: data.token_ids });
  else if (event === "text") {
    reply.phase = null;
    reply.content += data.text;
  } else if (event === "done") {
    const { command, curl, command_is_partial, ...turn } = data;
    Object.assign(reply, { content: turn.text ?? reply.content, turn, command, curl, partial: command_is_partial });
  } else if (event === "error") reply.error = streamed(data);
  tell(event !== "text");
}

async function ask(run, base, variant, settings) {
  const turns = chats.value[run];
  // A question that got no answer is left out with it: templates refuse two questions in a row.
  const unanswered = (one, place) => one.role === "user" && turns[place + 1]?.role === "assistant" && !turns[place + 1].content;
  const said = turns.filter((one, place) => one.content && !unanswered(one, place)).map(({ role, content }) => ({ role, content }));
  const messages = settings.system && !settings.plain ? [{ role: "system", content: settings.system }, ...said] : said;
  const reply = { role: "assistant", content: "", variant, busy: true, phase: { waiting: true } };
  turns.push(reply);
  const controller = new AbortController();
  active = { run, controller };
  tell();
  const body = { run, base: base || null, variant, messages, plain: !!settings.plain, settings: generationOf(settings), show_prompt: !!settings.show_prompt };
  try {
    await stream("chat", body, (event, data) => received(reply, event, data), controller.signal);
  } catch (error) {
    if (!controller.signal.aborted) Object.assign(reply, { error: error.error || { error: "InternalError", what: error.message } });
  }
  if (!reply.turn && !reply.error) reply.turn = { stop_reason: "cancelled" };
  Object.assign(reply, { busy: false, phase: null });
  active = null;
  tell();
  refreshSession();
}

/** The page: a conversation on the left, generation parameters in a drawer on the right. */
export default function Page({ query, session }) {
  const { run, base } = useRunOf(query, session);
  const { data, error, loading } = useRun({ run, base });
  const [settings, change, reset] = useSettings(session);
  const [drawer, setDrawer] = useState(false);
  useKeys({ stop: drawer ? () => setDrawer(false) : null });
  if (!run) return html`<h1>${t("page.nav.chat")}</h1><${NoRun} />`;
  if (error && !data) return html`<h1>${t("page.nav.chat")}</h1><${ErrorBox} error=${error} />`;
  const variants = variantsOf(data);
  const variant = query.variant || (variants.find((one) => one.value === "final") || variants[1] || { value: "final" }).value;
  return html`<div class="chat-page">
    <header class="page-head">
      <h1>${t("page.nav.chat")}</h1>
      <${VariantSelect} label=${t("page.chat.variant")} testid="chat-variant" variants=${variants} value=${variant}
        onchange=${(next) => amend({ variant: next })} />
      <button type="button" class="drawer-toggle" aria-expanded=${drawer} aria-controls="chat-settings" onclick=${() => setDrawer(!drawer)}>${t("page.chat.parameters")}</button>
    </header>
    ${loading && html`<${Loading} text=${t("page.common.reading_run")} />`}
    <div class="chat-columns">
      <${Conversation} run=${run} base=${base} variant=${variant} settings=${settings} change=${change} />
      <aside id="chat-settings" class=${`drawer ${drawer ? "is-open" : ""}`} aria-label=${t("page.chat.parameters")}>
        <div class="drawer-head"><h2>${t("page.chat.parameters")}</h2>
          <button type="button" class="drawer-close" aria-label=${t("page.common.close")} onclick=${() => setDrawer(false)}>×</button></div>
        <${SettingsForm} settings=${settings} change=${change} reset=${reset} more />
        ${session?.loaded && html`<${Unload} />`}
      </aside>
    </div>
  </div>`;
}

/** What a page says that has no run to be about. */
export function NoRun() {
  return html`<${Empty} title=${t("page.common.no_run")} hint=${t("page.common.no_run.hint")}
    action=${html`<${Button} kind="primary" onclick=${() => go("open", {})}>${t("page.common.open_run")}<//>`} />`;
}

function Unload() {
  const [error, setError] = useState(null);
  return html`<div class="unload"><${Button} onclick=${() => api.post("unload").then(refreshSession).then(() => setError(null), setError)}>${t("page.chat.unload")}<//>
    <p class="quiet">${t("page.chat.unload_hint")}</p>${error && html`<${ErrorBox} error=${error} />`}</div>`;
}

function Conversation({ run, base, variant, settings, change }) {
  const turns = chats.use()[run] || [];
  const busy = active?.run === run;
  const elsewhere = active !== null && !busy;
  const [draft, setDraft] = useState("");
  const end = useRef(null);
  useKeys({ stop: busy ? stop : null });
  useFollow(end, turns);
  const send = () => {
    if (!draft.trim() || active) return;
    chats.value[run] = [...turns, { role: "user", content: draft }];
    setDraft("");
    ask(run, base, variant, settings);
  };
  const again = (place, content) => {
    if (active) return;
    chats.value[run] = content === undefined ? turns.slice(0, place) : [...turns.slice(0, place), { role: "user", content }];
    const seed = (settings.seed || 0) + 1;
    const next = content === undefined && !settings.greedy && settings.temperature > 0 ? { ...settings, seed } : settings;
    if (next !== settings) change({ seed });
    ask(run, base, variant, next);
  };
  const clear = async () => {
    if (!(await confirmDialog({ title: t("page.chat.clear"), text: t("page.chat.clear_text"), danger: true }))) return;
    stop();
    delete chats.value[run];
    tell();
  };
  return html`<section class="conversation" aria-label=${t("page.chat.conversation")}>
    <div class="turns" role="log" aria-live="polite" aria-busy=${busy}>
      ${turns.length === 0 && html`<p class="starters">${t("page.chat.empty")}</p>`}
      ${turns.map((one, place) => one.role === "user"
        ? html`<${Question} key=${place} turn=${one} locked=${!!active} onedit=${(text) => again(place, text)} />`
        : html`<${Answer} key=${place} turn=${one} last=${place === turns.length - 1} locked=${!!active} onagain=${() => again(place)} />`)}
      <div ref=${end}></div>
    </div>
    <form class="composer" onsubmit=${(event) => { event.preventDefault(); send(); }}>
      <${Writing} value=${draft} onchange=${setDraft} onrun=${send} testid="chat-input" label=${t("page.chat.question")} placeholder=${t("page.chat.placeholder")} />
      <div class="composer-row">
        ${turns.length > 0 && html`<${Button} onclick=${clear}>${t("page.chat.clear")}<//>`}
        <span class="quiet keys">${elsewhere ? t("page.chat.elsewhere") : t("page.chat.keys")}</span>
        ${busy
          ? html`<${Button} kind="danger" testid="chat-stop" onclick=${stop}>${t("page.chat.stop")}<//>`
          : html`<${Button} kind="primary" testid="chat-send" disabled=${!draft.trim() || elsewhere} onclick=${send}>${t("page.chat.send")}<//>`}
      </div>
    </form>
  </section>`;
}

/** Keep the end in sight while it grows, unless the reader has scrolled away from it. */
function useFollow(end, turns) {
  const near = useRef(true);
  useEffect(() => {
    const scrolled = () => {
      const box = end.current?.parentElement;
      if (box) near.current = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
    };
    const box = end.current?.parentElement;
    box?.addEventListener("scroll", scrolled, { passive: true });
    return () => box?.removeEventListener("scroll", scrolled);
  }, []);
  const last = turns[turns.length - 1];
  useEffect(() => {
    const box = end.current?.parentElement;
    if (box && near.current) box.scrollTop = box.scrollHeight;
  }, [turns.length, last?.content, last?.busy]);
}

function Question({ turn, locked, onedit }) {
  const [text, setText] = useState(null);
  if (text === null) {
    return html`<article class="turn turn-user"><div class="model-text" dir="auto">${turn.content}</div>
      <div class="turn-tools"><button type="button" disabled=${locked} onclick=${() => setText(turn.content)}>${t("page.chat.edit")}</button></div></article>`;
  }
  const save = () => { setText(null); onedit(text); };
  return html`<article class="turn turn-user is-edited">
    <${Writing} focused value=${text} onchange=${setText} onrun=${save} onescape=${() => setText(null)} label=${t("page.chat.edit")} />
    <div class="turn-tools"><p class="quiet">${t("page.chat.edit_hint")}</p>
      <button type="button" onclick=${() => setText(null)}>${t("page.common.cancel")}</button>
      <button type="button" disabled=${!text.trim() || locked} onclick=${save}>${t("page.chat.send")}</button></div></article>`;
}

function Answer({ turn, last, locked, onagain }) {
  return html`<article class=${`turn turn-model ${turn.busy ? "is-busy" : ""}`}>
    <p class="who"><bdi>${turn.variant}</bdi></p>
    ${turn.phase?.loading && html`<${LoadingLine} progress=${turn.phase.loading} />`}
    ${turn.phase?.waiting && html`<p class="quiet" role="status">${t("page.chat.waiting")}</p>`}
    ${turn.error
      ? html`<${Refusal} error=${turn.error} />`
      : html`<div class="model-text reply" data-testid="chat-reply" dir="auto" translate="no">${turn.content || (turn.busy ? "" : html`<span class="quiet">${t("outputs.empty")}</span>`)}</div>`}
    ${turn.turn && html`<${ReplyFoot} turn=${turn.turn} />`}
    ${turn.prompt !== undefined && turn.prompt !== null && html`<${Rendered} turn=${turn} />`}
    ${!turn.busy && html`<div class="turn-tools">
      ${last && html`<button type="button" disabled=${locked} onclick=${onagain} data-testid="chat-again">${t(turn.error ? "page.common.retry" : "page.chat.regenerate")}</button>`}
      ${turn.command && html`<details class="elsewhere"><summary>${t("page.chat.repeat")}</summary>
        ${turn.partial && html`<p class="quiet">${t("page.chat.partial")}</p>`}
        <${Command} text=${turn.command} />${turn.curl && html`<${Command} text=${turn.curl} />`}</details>`}
    </div>`}
  </article>`;
}

function Rendered({ turn }) {
  return html`<details class="rendered"><summary>${t("page.chat.prompt", { tokens: turn.token_ids?.length ?? 0 })}</summary>
    <pre class="model-text">${turn.prompt}</pre>
    ${turn.token_ids && html`<pre class="token-ids" tabindex="0">${turn.token_ids.join(" ")}</pre>`}</details>`;
}
