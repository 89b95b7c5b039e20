"use strict";
// The data of the page: JSON, gzipped, as base64. Browsers without DecompressionStream use the inflater below (RFC 1951).

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  if (typeof DecompressionStream === "undefined") {
    return JSON.parse(new TextDecoder().decode(inflate(bytes.subarray(10))));  // behind gzip's header
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const LENGTH_BASE = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
  227, 258];
const LENGTH_BITS = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const CODE_ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

// A Huffman code from the lengths of its words: how many words have each length, and the symbols by word.
function huffman(lengths) {
  const counts = new Uint16Array(16), offsets = new Uint16Array(16), symbols = [];
  for (const length of lengths) counts[length] += 1;
  counts[0] = 0;
  for (let length = 1; length < 16; length += 1) offsets[length] = offsets[length - 1] + counts[length - 1];
  lengths.forEach((length, symbol) => { if (length) symbols[offsets[length]++] = symbol; });
  return { counts, symbols };
}

function inflate(source) {
  let place = 0, bit = 0, end = 0, room = new Uint8Array(1 << 16);
  const take = (count) => {
    let value = 0;
    for (let index = 0; index < count; index += 1) {
      value |= ((source[place] >> bit) & 1) << index;
      bit += 1;
      if (bit === 8) { bit = 0; place += 1; }
    }
    return value;
  };
  const put = (byte) => {
    if (end === room.length) {
      const larger = new Uint8Array(2 * end);
      larger.set(room);
      room = larger;
    }
    room[end++] = byte;
  };
  const symbolOf = ({ counts, symbols }) => {
    let code = 0, first = 0, index = 0;
    for (let length = 1; length < 16; length += 1) {
      code |= take(1);
      if (code - counts[length] < first) return symbols[index + code - first];
      index += counts[length];
      first = (first + counts[length]) << 1;
      code <<= 1;
    }
    throw new Error("the data of this page is corrupt.");
  };
  for (let last = 0; !last;) {
    last = take(1);
    const kind = take(2);
    if (kind === 0) {
      if (bit) { bit = 0; place += 1; }
      const count = source[place] | (source[place + 1] << 8);
      place += 4;
      for (let index = 0; index < count; index += 1) put(source[place++]);
      continue;
    }
    const [literals, distances] = kind === 1 ? fixedCodes() : readCodes(take, symbolOf);
    for (let symbol = symbolOf(literals); symbol !== 256; symbol = symbolOf(literals)) {
      if (symbol < 256) { put(symbol); continue; }
      const count = LENGTH_BASE[symbol - 257] + take(LENGTH_BITS[symbol - 257]);
      const far = symbolOf(distances), bits = far < 4 ? 0 : (far >> 1) - 1;
      const back = (far < 4 ? far + 1 : ((2 + (far & 1)) << bits) + 1) + take(bits);
      for (let index = 0; index < count; index += 1) put(room[end - back]);
    }
  }
  return room.subarray(0, end);
}

function fixedCodes() {
  const lengths = Array.from({ length: 288 }, (_, at) => (at < 144 ? 8 : at < 256 ? 9 : at < 280 ? 7 : 8));
  return [huffman(lengths), huffman(new Array(30).fill(5))];
}

function readCodes(take, symbolOf) {
  const literals = take(5) + 257, distances = take(5) + 1, count = take(4) + 4;
  const short = new Array(19).fill(0);
  for (let index = 0; index < count; index += 1) short[CODE_ORDER[index]] = take(3);
  const code = huffman(short), lengths = [];
  while (lengths.length < literals + distances) {
    const symbol = symbolOf(code);
    if (symbol < 16) { lengths.push(symbol); continue; }
    const value = symbol === 16 ? lengths[lengths.length - 1] : 0;
    const times = symbol === 16 ? 3 + take(2) : symbol === 17 ? 3 + take(3) : 11 + take(7);
    for (let index = 0; index < times; index += 1) lengths.push(value);
  }
  return [huffman(lengths.slice(0, literals)), huffman(lengths.slice(literals))];
}
