// The chat page: talks to the server that it came from, keeps conversations in the browser. All text is shown as text, never as HTML.
import { readEvents } from "./events.js";
import { dropConversation, hasText, idOf, keepConversation, keepSetting, loadConversation, loadConversations, loadSettings, newConversation, wasKept } from "./store.js";

const at = (id) => document.getElementById(id);
// `answered` is the conversation that an answer is coming for, `unkept` those that the browser had no room for.
const state = { conversations: loadConversations(), current: null, running: null, answered: null, unkept: new Set() };
const settings = { temperature: 1, length: null, model: null, theme: "auto", ...loadSettings() };

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

// Keeping ---------------------------------------------------------------------------------------------------------------

function isKept(found) {
  if (!found) say("This browser keeps no more data for this page: what is new is lost with the tab. Delete some conversations.");
  return found;
}

function keep(talk) {
  const id = talk.id;
  if (isKept(keepConversation(talk))) state.unkept.delete(talk);
  else state.unkept.add(talk);
  if (talk.id !== id) takeOver(id);  // what another tab has made of it is beside it now
}

function set(name, value) {
  settings[name] = value;
  isKept(keepSetting(name, value));
}

// A conversation as another tab has kept or deleted it. One that has something new here stays as it is until that is kept.
function takeOver(id) {
  const held = state.conversations.find((each) => each.id === id);
  if (held && (held === state.answered || state.unkept.has(held))) return;
  const wasHere = held && wasKept(held), found = loadConversation(id);
  if (found && held) Object.assign(held, found);
  else if (found) state.conversations.push(found);
  else if (wasHere) forget(held);
  if (!state.conversations.includes(state.current)) start();
  else if (held && held === state.current) show();
  else showList();
}

function forget(talk) {
  dropConversation(talk);
  state.conversations = state.conversations.filter((each) => each !== talk);
  for (const each of state.unkept) state.conversations.includes(each) ? keep(each) : state.unkept.delete(each);  // there is room now
}

// Conversations ---------------------------------------------------------------------------------------------------------

function start() {
  stop();
  if (!state.conversations.includes(state.current) || state.current.messages.length) {
    state.current = newConversation();
    state.conversations.push(state.current);
  }
  showSide(false);
  show();
  at("input").focus();
}

function open(talk) {
  stop();
  state.current = talk;
  say("");
  showSide(false);
  show();
}

function remove(talk) {
  if (talk === state.current) stop();
  forget(talk);
  if (talk !== state.current) showList();
  else if (state.conversations.length) open(state.conversations[0]);
  else start();
}

function titleOf(each) {
  return each.messages[0]?.content.slice(0, 60) || "New conversation";
}

function showList() {
  state.conversations.sort((one, other) => other.made - one.made);
  at("conversations").replaceChildren(...state.conversations.map((each) => {
    const title = titleOf(each);
    const opens = element("button", { type: "button", className: "open", textContent: title, onclick: () => open(each) });
    opens.setAttribute("aria-current", String(each === state.current));
    const removes = element("button", { type: "button", textContent: "×", title: "Delete", onclick: () => remove(each) });
    removes.setAttribute("aria-label", `Delete: ${title}`);
    return element("li", {}, opens, removes);
  }));
}

function showSide(isShown) {  // on narrow screens; elsewhere it is always there
  at("side").classList.toggle("shown", isShown);
  at("menu").setAttribute("aria-expanded", String(isShown));
}

// Messages --------------------------------------------------------------------------------------------------------------

function show() {
  const { messages, system } = state.current;
  showList();
  if (at("system").value !== system) at("system").value = system;
  at("messages").replaceChildren(...messages.map((message, index) => shown(message, index === messages.length - 1)));
  if (!messages.length) at("messages").append(element("p", { className: "empty", textContent: "Ask something." }));
  at("messages").scrollTop = at("messages").scrollHeight;
}

function shown(message, isLast) {
  const text = element("div", { className: "text", textContent: message.content });
  const copy = element("button", { type: "button", textContent: "Copy", onclick: () => copied(message.content, copy) });
  const tools = element("div", { className: "tools" }, copy);
  if (isLast && !state.running) {
    const label = message.role === "user" ? "Try again" : "Regenerate";
    tools.append(element("button", { type: "button", textContent: label, className: "again", onclick: regenerate }));
  }
  if (message.note) tools.append(element("span", { textContent: message.note }));
  const isRunning = isLast && state.running && message.role === "assistant";
  const whose = element("span", { className: "hidden", textContent: message.role === "user" ? "You:" : "Model:" });
  return element("article", { className: `message ${message.role}${isRunning ? " running" : ""}` }, whose, text, tools);
}

async function copied(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch (error) {
    // Browsers give the clipboard to pages of https and of this computer only.
    button.textContent = "This browser does not let the page copy";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

// Answers ---------------------------------------------------------------------------------------------------------------

function send() {
  const content = at("input").value.trim();
  if (!content || state.running) return;
  at("input").value = "";
  state.current.messages.push({ role: "user", content });
  answer();
}

function regenerate() {
  if (state.running) return;
  const { messages } = state.current;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  if (messages.length) answer();
}

function stop() {
  state.running?.abort();
}

function requested(talk) {
  const messages = talk.system.trim() ? [{ role: "system", content: talk.system }] : [];
  for (const { role, content } of talk.messages.filter(hasText)) {
    // A question that got no answer is part of the next one: roles have to alternate.
    if (role === "user" && messages.at(-1)?.role === "user") messages.at(-1).content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  const body = { messages, stream: true, temperature: settings.temperature };
  if (settings.model) body.model = settings.model;
  if (settings.length) body.max_tokens = settings.length;
  return body;
}

async function answer() {
  const talk = state.current, running = new AbortController(), body = JSON.stringify(requested(talk));
  const message = { role: "assistant", content: "" };
  state.running = running;
  state.answered = talk;
  talk.messages.push(message);
  say("");
  keep(talk);
  busy(true);
  try {
    const response = await asked("v1/chat/completions", { method: "POST", body, signal: running.signal });
    for await (const event of readEvents(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      message.content += choice?.delta?.content ?? "";
      if (choice?.finish_reason === "length") message.note = "Cut off: this is as long as an answer may be.";
      if (talk === state.current) grow(message);
    }
  } catch (error) {
    if (running.signal.aborted) message.note = "Stopped.";
    else say(failure(error));
  }
  if (!hasText(message)) talk.messages.splice(talk.messages.indexOf(message), 1);
  state.running = state.answered = null;
  if (state.conversations.includes(talk)) keep(talk);
  busy(false);
}

function grow(message) {
  const box = at("messages"), follows = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  box.querySelector(".running .text").textContent = message.content;
  if (follows) box.scrollTop = box.scrollHeight;
}

function busy(isBusy) {
  at("send").hidden = isBusy;
  at("stop").hidden = !isBusy;
  at("messages").setAttribute("aria-busy", String(isBusy));
  show();
}

async function asked(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`);
}

function failure(error) {
  return error instanceof TypeError ? "The server cannot be reached. Is it running? Try again then." : error.message;
}

// Settings --------------------------------------------------------------------------------------------------------------

async function listModels() {
  try {
    const names = (await (await asked("v1/models")).json()).data.map((model) => model.id);
    if (!names.includes(settings.model)) settings.model = names[0];
    at("model").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name, selected: name === settings.model })));
    say("");
  } catch (error) {
    say(failure(error));
  }
}

function showTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  at("theme").textContent = `Theme: ${theme}`;
}

function setUp() {
  at("temperature").value = at("shown").value = settings.temperature;
  at("length").value = settings.length ?? "";
  at("key").value = sessionStorage.getItem("key") ?? "";
  showTheme(settings.theme);
  at("temperature").oninput = () => { set("temperature", Number(at("temperature").value)); at("shown").value = settings.temperature; };
  at("length").onchange = () => { set("length", Math.max(0, Math.floor(Number(at("length").value))) || null); at("length").value = settings.length ?? ""; };
  at("system").oninput = () => { state.current.system = at("system").value; keep(state.current); };
  at("key").onchange = () => { sessionStorage.setItem("key", at("key").value); listModels(); };
  at("model").onchange = () => set("model", at("model").value);
  at("theme").onclick = () => { set("theme", { auto: "light", light: "dark", dark: "auto" }[settings.theme]); showTheme(settings.theme); };
  at("settings").onsubmit = (event) => event.preventDefault();
  at("composer").onsubmit = (event) => { event.preventDefault(); send(); };
  at("input").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  };
  at("new").onclick = start;
  at("stop").onclick = stop;
  at("menu").onclick = () => showSide(!at("side").classList.contains("shown"));
  document.onkeydown = (event) => { if (event.key === "Escape") stop(); };
  window.onpagehide = () => { for (const each of new Set([state.answered, ...state.unkept].filter(Boolean))) keep(each); };
  window.onstorage = (event) => { if (idOf(event.key) !== null) takeOver(idOf(event.key)); };
  // Out of the browser's memory: what other tabs did meanwhile.
  window.onpageshow = (event) => { if (event.persisted) for (const { id } of [...state.conversations, ...loadConversations()]) takeOver(id); };
}

setUp();
showList();
if (state.conversations.length) open(state.conversations[0]);
else start();
at("input").focus();
listModels();
