// src/<widget>.ts -> ../rlhf_nb/ui/static/<widget>.js (one ES module each, everything inlined: anywidget serves single files)
// src/<widget>.css -> ../rlhf_nb/ui/static/<widget>.css
import { existsSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { basename, dirname, extname, join } from "node:path";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const source = join(here, "src");
const target = join(here, "..", "rlhf_nb", "ui", "static");

const entries = (existsSync(source) ? readdirSync(source) : []).filter((name) => /\.(ts|css)$/.test(name) && !name.endsWith(".d.ts"));

mkdirSync(target, { recursive: true });
// A widget that was renamed or removed must not live on in the next wheel.
const wanted = new Set(entries.map((name) => basename(name).replace(/\.ts$/, ".js")));
for (const name of readdirSync(target)) {
  if ([".js", ".css"].includes(extname(name)) && !wanted.has(name)) rmSync(join(target, name));
}

const options = {
  entryPoints: entries.map((name) => join(source, name)),
  outdir: target,
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  sourcemap: false,
  legalComments: "none",
  charset: "utf8",
  logLevel: "warning",
};

if (entries.length === 0) {
  console.log("no widgets in src/");
} else if (process.argv.includes("--watch")) {
  await (await esbuild.context({ ...options, logLevel: "info" })).watch();
} else {
  const { metafile } = await esbuild.build({ ...options, metafile: true });
  for (const [path, { bytes }] of Object.entries(metafile.outputs)) console.log(`${basename(path)}  ${(bytes / 1024).toFixed(1)} kB`);
}
