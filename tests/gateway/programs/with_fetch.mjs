// Score with fetch: with_fetch.mjs PNG KEY CERTIFICATE URL...
// Node.js reads the certificate from NODE_EXTRA_CA_CERTS.
import { readFileSync } from 'node:fs';

const [file, key, , ...urls] = process.argv.slice(2);
const png = readFileSync(file);
const post = async (url, body, headers = {}) => {
  const reply = await fetch(url, { method: 'POST', body, headers: { 'X-API-Key': key, ...headers } });
  console.log(await reply.text());
};
for (const url of urls) {
  await post(`${url}/score`, png, { 'Content-Type': 'image/png' });
  const form = new FormData();
  form.append('file', new Blob([png], { type: 'image/png' }), 'zéro.png');
  form.append('alpha', '0.05');
  await post(`${url}/score`, form);
  const batch = new FormData();
  batch.append('files', new Blob([png]), 'a.png');
  batch.append('files', new Blob([png]), 'b.png');
  await post(`${url}/score/batch`, batch);
}
