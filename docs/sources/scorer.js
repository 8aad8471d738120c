/* How the site's search ranks pages: see docs/sources/search.py. Sphinx's own ranking takes the best word of a query
   alone, so most pages tie, and the alphabet decides. */
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,

  // Pages that name everything once: below all others.
  last: new Set(["changelog", "contributing", "glossary"]),
  words: (text) => text.toLowerCase().match(/[a-z0-9_]+/g) || [],
  heads: null,

  // The words of a page's title and of its search words count most, those of its sections half.
  headsOf: (page) => {
    if (!Scorer.heads) {
      const { docnames, alltitles, indexentries, titles } = Search._index, stemmer = new Stemmer();
      Scorer.heads = Object.fromEntries(docnames.map((name) => [name, new Map()]));
      const add = (text, file, worth) => {
        const heads = Scorer.heads[docnames[file]];
        for (const word of Scorer.words(text)) {
          const stem = stemmer.stemWord(word);
          heads.set(stem, Math.max(worth, heads.get(stem) || 0));
        }
      };
      titles.forEach((title, file) => add(title, file, 1));
      for (const [title, found] of Object.entries(alltitles)) found.forEach(([file]) => add(title, file, 0.5));
      for (const [entry, found] of Object.entries(indexentries))
        if (!entry.includes("(")) found.forEach(([file]) => add(entry, file, 1));
    }
    return Scorer.heads[page];
  },

  score: (result) => {
    const [page, , anchor, , score, , kind] = result;
    if (kind === "index") result[2] = ""; // leads to the page's top: the same result as that of its text, shown once
    if (Scorer.last.has(page)) return kind === "title" && !anchor ? score : score - 200; // its own title is asked for
    if (kind !== "text") return score;
    const stemmer = new Stemmer(), asked = new URLSearchParams(window.location.search).get("q") || "";
    const words = Scorer.words(asked).map((word) => stemmer.stemWord(word)), heads = Scorer.headsOf(page);
    const found = words.map((word) => heads.get(word) || 0).reduce((sum, worth) => sum + worth, 0);
    const share = found / Math.max(1, words.length);
    // Guides before pages in folders, which are for fewer readers.
    return score + 40 * share - (page.includes("/") ? 1 : 0);
  },
};
