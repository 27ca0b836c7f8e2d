// The routes as Swagger UI shows them; its files come from the service itself.

import { key } from "./api.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", paint);
paint();

const ui = window.SwaggerUIBundle({
  url: "openapi.json",
  domNode: document.getElementById("swagger"),
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  validatorUrl: null, // nobody else needs to know what is looked at
  onComplete: () => key.get() && ui.preauthorizeApiKey("APIKeyHeader", key.get()),
});
