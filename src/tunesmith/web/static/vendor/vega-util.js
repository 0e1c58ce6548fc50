// What vega-interpreter takes of vega-util, which vega.js holds; vega.js is loaded first, as a classic script.
export const { ascending, isString, DisallowedObjectProperties } = globalThis.vega;
