// What the page keeps in the browser, under names of its own: the settings, and each conversation by itself, so that no tab writes over
// what another has kept.
const SETTINGS = "keras_gemma2.settings", CONVERSATION = "keras_gemma2.conversation.";
const seen = new Map();  // of each conversation by its id, the text that was read or written last

export const hasText = (message) => message.content.trim() !== "";
const identity = () => ({ id: crypto.randomUUID?.() ?? String(Math.random()), made: Date.now() });

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch (error) {
    console.warn(`What was kept as ${key} cannot be read: ${error.message}`);
    return null;
  }
}

function write(key, text) {
  try {
    localStorage.setItem(key, text);
    return true;
  } catch (error) {
    console.warn(`${key} cannot be kept: ${error.message}`);
    return false;
  }
}

export function loadSettings() {
  const found = read(SETTINGS);
  return typeof found === "object" && !Array.isArray(found) ? found : {};  // what spreads to nothing, too: null
}

// Whether there was room for it; so with all that keep something.
export const keepSetting = (name, value) => write(SETTINGS, JSON.stringify({ ...loadSettings(), [name]: value }));

export const newConversation = () => ({ ...identity(), system: "", messages: [] });

// The id of the conversation that a key of the storage stands for; null for other keys.
export const idOf = (key) => (key?.startsWith(CONVERSATION) ? key.slice(CONVERSATION.length) : null);

// A conversation as it is kept now; null if it is not.
export function loadConversation(id) {
  const found = read(CONVERSATION + id);
  if (!Array.isArray(found?.messages)) return null;
  seen.set(id, localStorage.getItem(CONVERSATION + id));
  return { made: 0, system: "", ...found, id };
}

export function loadConversations() {
  return Object.keys(localStorage).map(idOf).filter((id) => id !== null).map(loadConversation).filter((each) => each !== null);
}

// Where another tab has gone on with it meanwhile, or deleted it, what is kept is another conversation: it gets an id of its own.
export function keepConversation(talk) {
  // An answer of which nothing has come is none yet: the page may be left before it does.
  const messages = talk.messages.filter(hasText);
  if (localStorage.getItem(CONVERSATION + talk.id) !== (seen.get(talk.id) ?? null)) Object.assign(talk, identity());
  if (!messages.length && !talk.system) return dropConversation(talk);
  const text = JSON.stringify({ ...talk, messages });
  const isKept = write(CONVERSATION + talk.id, text);
  if (isKept) seen.set(talk.id, text);
  return isKept;
}

export function dropConversation(talk) {
  seen.delete(talk.id);
  localStorage.removeItem(CONVERSATION + talk.id);
  return true;
}

export const wasKept = (talk) => seen.has(talk.id);
