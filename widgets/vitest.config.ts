import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    environment: "jsdom",
    include: ["tests/**/*.test.ts"],
    restoreMocks: true,
    // Two cores are shared with the Python suite: one worker keeps fake timers and layout tests honest.
    maxWorkers: 1,
  },
});
