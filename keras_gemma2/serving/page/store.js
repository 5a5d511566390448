// What the page keeps in the browser, under names of its own; what is not there, or not readable, is the fallback.
const PREFIX = "keras_gemma2.";

export function load(name, fallback) {
  try {
    const found = JSON.parse(localStorage.getItem(PREFIX + name));
    return found !== null && Array.isArray(found) === Array.isArray(fallback) ? found : fallback;
  } catch (error) {
    console.warn(`What was kept as ${name} cannot be read: ${error.message}`);
    return fallback;
  }
}

export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch (error) {
    console.warn(`${name} cannot be kept: ${error.message}`);
    return false;
  }
}
