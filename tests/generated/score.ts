// Scores an image with the types that openapi-typescript generated: node score.js URL IMAGE.
import { readFileSync } from "node:fs";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const [url, image] = process.argv.slice(2) as [string, string];
const client = createClient<paths>({ baseUrl: url });
const content = readFileSync(image);

function score(body: Uint8Array) {
  const form = new FormData();
  form.append("file", new Blob([body as BlobPart], { type: "image/png" }), "image.png");
  return client.POST("/score", {
    params: { query: { model: "zero" } },
    body: { file: "" },
    bodySerializer: () => form,
  });
}

const scored = await score(content);
const rejected = await score(new Uint8Array([1, 2, 3]));
const problem = rejected.error as components["schemas"]["ProblemDocument"];
const model = await client.GET("/models/{name}", { params: { path: { name: "zero" } } });
const tensor = await client.POST("/v2/models/{name}/infer", {
  params: { path: { name: "zero" } },
  body: { inputs: [{ name: "images", shape: [1, 28, 28], datatype: "UINT8", data: new Array(784).fill(0) }] },
});
const missing = await client.GET("/v2/models/{name}", { params: { path: { name: "none" } } });
console.log(
  JSON.stringify({
    form: scored.data,
    problem: problem.type,
    model: (model.data as components["schemas"]["Manifest"]).name,
    tensor: (tensor.data as components["schemas"]["InferResponse"]).outputs.map((output) => [output.name, output.data]),
    missing: missing.error?.error,
  }),
);
