// The browser's part: play the video, open the camera, and tell the server at each tick what to watch.
() => {
  const MOST = 16; // Camera frames that wait for the next tick. Older ones are dropped and counted.
  const SILENCE = 5000; // Milliseconds without a tick after which the page asks whether the server is still there.
  const page = { frames: [], dropped: 0, jump: null, url: null, capture: null, started: 0, turn: 0, ticked: 0 };
  window.page = page;
  const stage = () => document.querySelector("#stage");
  const player = () => document.querySelector("#player");
  const Recognition = window.SpeechRecognition || window.webkitSpeechRecognition;
  Object.assign(page, { told: [], aloud: false, language: "en-US", recognition: null });
  document.body.classList.toggle("reads", "speechSynthesis" in window && "SpeechSynthesisUtterance" in window);
  document.body.classList.toggle("listens", Boolean(Recognition));
  const hush = () => { if (page.aloud) window.speechSynthesis.cancel(); };
  const say = (text) => { document.querySelector("#notice").textContent = text; };

  const shape = () => {
    const video = player();
    if (video.videoWidth) stage().style.setProperty("--ratio", video.videoWidth / video.videoHeight);
  };

  const stop = () => {
    hush();
    clearInterval(page.capture);
    page.capture = null;
    const video = player();
    if (video.srcObject) video.srcObject.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    page.frames = [];
    page.dropped = 0;
    page.jump = null;
    page.url = null;
  };

  // Nobody watches: the camera must not stay on, and a file must not go on without its words.
  page.stop = () => {
    stop();
    const video = player();
    video.removeAttribute("src");
    video.controls = false;
    video.load();
    stage().classList.remove("playing");
  };

  // When the server cannot be reached, Gradio ends its ticks and tells nothing of ours. It loads the page again later.
  setInterval(async () => {
    if (!(page.url || page.capture) || performance.now() - page.ticked < SILENCE) return;
    const asked = page.ticked = performance.now();
    const options = { method: "HEAD", cache: "no-store", signal: AbortSignal.timeout(6 * SILENCE) };
    const answer = await fetch(location.href, options).catch(() => null);
    // Any answer but a fault of the server will do. Ticks may also have come meanwhile.
    if (answer?.status < 500 || page.ticked !== asked || !(page.url || page.capture)) return;
    page.stop();
    say("The server cannot be reached. Nothing is watched, and the camera is off.");
  }, 1000);

  // The server reads a file itself. Each tick tells it how far the browser has played.
  page.play = (url) => {
    if (!url) return;
    page.turn += 1;
    stop();
    say("");
    const video = player();
    let loaded = false;
    video.onloadeddata = () => { loaded = true; };
    video.onresize = shape;
    // Keep the second of the jump: by the next tick, playing has gone on.
    video.onseeking = () => {
      hush();
      if (page.url && loaded) page.jump = video.currentTime;
    };
    video.onerror = () => { if (page.url) say("This browser cannot play this file. Use an mp4 with H.264, or webm."); };
    page.url = url;
    video.controls = true;
    video.src = url;
    stage().classList.add("playing");
    video.play().catch((error) => { if (error.name === "NotAllowedError") say("Press play to begin."); });
  };

  // Take camera frames at `fps` and send them with the next tick. Returns whether the person granted the camera.
  page.camera = async (fps) => {
    if (!navigator.mediaDevices) {
      say("A camera needs a page over https or on this machine.");
      return false;
    }
    const turn = ++page.turn;
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: { ideal: "environment" } }, audio: false });
    } catch (error) {
      say(`The camera cannot be opened (${error.name}). Allow it for this page, or choose a video.`);
      return false;
    }
    if (turn !== page.turn) {
      // The person started something else while the browser asked.
      stream.getTracks().forEach((track) => track.stop());
      return false;
    }
    stop();
    say("");
    const video = player();
    video.removeAttribute("src");
    video.controls = false;
    video.onresize = shape;
    video.srcObject = stream;
    stage().classList.add("playing");
    await video.play();
    page.started = performance.now();
    page.watchAt(fps);
    return true;
  };

  page.watchAt = (fps) => {
    const video = player();
    const canvas = document.createElement("canvas");
    clearInterval(page.capture);
    page.capture = setInterval(() => {
      if (video.paused || !video.videoWidth) return;
      const scale = Math.min(1, 512 / Math.max(video.videoWidth, video.videoHeight));
      canvas.width = Math.round(video.videoWidth * scale);
      canvas.height = Math.round(video.videoHeight * scale);
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
      const time = Math.round(performance.now() - page.started) / 1000;
      page.frames.push({ time, image: canvas.toDataURL("image/jpeg", 0.92) });
      if (page.frames.length > MOST) { page.frames.shift(); page.dropped += 1; }
    }, 1000 / fps);
  };

  page.pause = () => {
    const video = player();
    if (video.paused) video.play(); else video.pause();
    if (video.paused) hush();
  };

  // Announce new replies to screen readers, and read them aloud, each once. `said` is all that was said in the stream, or
  // that it is over.
  page.tell = (said) => {
    if (said?.over) return page.stop();
    const lines = (said || []).map((event) => JSON.stringify(event));
    // An answer that a newer one has overtaken tells nothing new. Events name their stream, so a new one is never taken for it.
    if (lines.every((line, index) => line === page.told[index])) return;
    const goesOn = page.told.every((line, index) => line === lines[index]);
    const fresh = (said || []).slice(goesOn ? page.told.length : 0);
    page.told = lines;
    if (!goesOn) hush();
    const replies = fresh.filter((event) => event.role === "assistant" && event.text);
    // The captions are drawn as new elements, which many screen readers do not announce.
    if (replies.length) document.querySelector("#announced").textContent = replies.map(({ text }) => text).join(" ");
    if (!page.aloud || page.recognition) return;
    for (const { text } of replies) {
      // Narration is live: two sentences that are late give way to the new one.
      if (window.speechSynthesis.pending) window.speechSynthesis.cancel();
      const utterance = new window.SpeechSynthesisUtterance(text);
      utterance.lang = page.language;
      window.speechSynthesis.speak(utterance);
    }
  };

  page.readAloud = (aloud) => {
    hush();
    page.aloud = aloud;
  };
  window.addEventListener("pagehide", hush);

  // Listen to one question, and return it. If nothing was heard the promise is rejected, so that nothing is asked. A second
  // press ends listening.
  page.listen = () => new Promise((resolve, reject) => {
    if (page.recognition) {
      page.recognition.stop();
      reject();
      return;
    }
    hush();
    say("");
    let heard = "";
    const button = document.querySelector("#listen");
    const recognition = new Recognition();
    recognition.lang = page.language;
    recognition.onresult = (event) => { heard = event.results[0][0].transcript; };
    recognition.onerror = (event) => {
      say(`The question was not heard (${event.error}). Allow the microphone for this page, or type the question.`);
    };
    recognition.onend = () => {
      page.recognition = null;
      button.setAttribute("aria-pressed", "false");
      if (heard) resolve(heard); else reject();
    };
    page.recognition = recognition;
    button.setAttribute("aria-pressed", "true");
    recognition.start();
  });

  // Return the second at which a new stream starts. The camera uses the new rate from now on.
  page.now = (fps) => {
    const video = player();
    hush();
    if (page.capture) page.watchAt(fps);
    if (page.url && video.ended) {
      video.currentTime = 0;
      video.play();
      return 0;
    }
    return page.url ? video.currentTime : null;
  };

  // Return what a tick sends: camera frames, how many were dropped, the second being played, and the second of a jump.
  page.collect = () => {
    const { frames, dropped, jump } = page;
    page.ticked = performance.now();
    page.frames = [];
    page.dropped = 0;
    const video = player();
    const until = page.url ? video.currentTime + (video.ended ? 1 : 0) : null;
    // During a seek, the current second is not yet the one shown.
    if (jump !== null && video.seeking) return [[], 0, null, null];
    page.jump = null;
    return [frames, dropped, until, jump];
  };

  // Screen readers hear what `tell` announces. The chat repeats it, so it stays silent.
  const quiet = setInterval(() => {
    const log = document.querySelector("#chat [aria-live]");
    if (log) { log.setAttribute("aria-live", "off"); clearInterval(quiet); }
  }, 500);
}
