"use strict";
(() => {
  const root = document.documentElement;
  const htmlLang = { en: "en", zh: "zh-Hans" };

  const recall = (key) => {
    try { return localStorage.getItem("tunesmith." + key); } catch { return null; }
  };
  const remember = (key, value) => {
    try { localStorage.setItem("tunesmith." + key, value); } catch { /* a file opened from disk may have no storage */ }
  };
  const press = (name, value) => {
    for (const button of document.querySelectorAll(`[data-switch="${name}"] button`)) {
      button.setAttribute("aria-pressed", String(button.dataset.value === value));
    }
  };
  const setLang = (value) => {
    root.dataset.lang = value;
    root.lang = htmlLang[value];
    press("lang", value);
  };
  const setTheme = (value) => {
    if (value === "auto") delete root.dataset.theme;
    else root.dataset.theme = value;
    press("theme", value);
  };

  const asked = new URLSearchParams(location.search);
  const known = (value, values) => (values.includes(value) ? value : null);
  const preferred = () => {
    const first = (navigator.languages || []).find((tag) => /^(zh|en)\b/i.test(tag));
    return first && /^zh\b/i.test(first) ? "zh" : "en";
  };
  setLang(known(asked.get("lang"), ["en", "zh"]) || known(recall("lang"), ["en", "zh"]) || preferred());
  setTheme(known(asked.get("theme"), ["auto", "light", "dark"]) || known(recall("theme"), ["auto", "light", "dark"]) || "auto");

  for (const group of document.querySelectorAll("[data-switch]")) {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      (group.dataset.switch === "lang" ? setLang : setTheme)(button.dataset.value);
      remember(group.dataset.switch, button.dataset.value);
    });
  }
  document.querySelector(".switches").hidden = false;

  const filters = document.querySelector(".filters");
  if (filters) {
    filters.hidden = false;
    filters.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const wanted = button.dataset.filter;
      for (const each of filters.querySelectorAll("button")) each.setAttribute("aria-pressed", String(each === button));
      for (const article of filters.parentElement.querySelectorAll("article")) {
        article.hidden = wanted !== "" && !(article.dataset.marks || "").split(" ").includes(wanted);
      }
      for (const fold of filters.parentElement.querySelectorAll("details.fold")) {
        fold.open = wanted !== "";
        fold.hidden = !fold.querySelector("article:not([hidden])");
      }
    });
  }

  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of folded) details.open = false;
  });
})();
